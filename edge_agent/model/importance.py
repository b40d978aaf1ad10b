"""What heads and feed-forward channels are worth to this device's task: a few bytes each, from which no
example can be read off.

Per matrix, then summed, each divided by its own norm: the LoRA estimate of Taylor importance, Σ|(gB·A +
B·gA) ∘ (W + s·B·A)| over a group's rows or columns (LoRAPrune, 2305.18403, without its third term, which
is of second order in the step); and, for every layer, the size of what goes into o and down times the norm
of the columns that read it.
"""

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from rankfleet.federated.contract.tensors import Array, Tensors
from rankfleet.profiles.card import ModelCard, Module

from .base import Base

BLOCK = 256
"""Rows of an estimated gradient that are formed at once: the whole of it would be as large as the weight."""
KINDS = ("channels", "heads")


def scores(
    base: Base, card: ModelCard, grads: Mapping[str, Tensor], batches: list[dict[str, Tensor]]
) -> Tensors:
    """`p/channels/<layer>` and `p/heads/<layer>` → u8, on a scale of fourth powers up to the layer's best."""
    found: dict[tuple[str, int], Array] = {}
    for m in card.modules:
        if m.name in base.sites and f"{m.name}.A" in grads and f"{m.name}.B" in grads:
            _add(found, card, m, _estimate(base, m, grads))
    for m, vector in _activations(base, card, batches):
        _add(found, card, m, vector)
    return {f"p/{kind}/{layer}": packed(v) for (kind, layer), v in sorted(found.items())}


def packed(values: Array) -> Array:
    """Non-negative scores as u8."""
    top = float(values.max())
    return (
        np.round(255 * (values / top) ** 0.25).astype(np.uint8)
        if top > 0
        else np.zeros(len(values), np.uint8)
    )


def _add(found: dict[tuple[str, int], Array], card: ModelCard, m: Module, vector: Tensor) -> None:
    """A matrix's share, by the groups that its rows or columns belong to."""
    kind = "channels" if m.role in ("up", "down") else "heads"
    if m.role == "qkv":
        parts = [part.reshape(card.groups, -1).sum(1) for part in vector.chunk(3)]
        vector = torch.stack(parts).sum(0)
    elif kind == "heads":
        vector = vector.reshape(card.groups, -1).sum(1)
    size = float(vector.norm())
    if size > 0 and np.isfinite(size):
        key = (kind, m.layer)
        found[key] = found.get(key, np.zeros(len(vector))) + vector.double().cpu().numpy() / size


def _estimate(base: Base, m: Module, grads: Mapping[str, Tensor]) -> Tensor:
    """Σ|Ĝ ∘ W_eff| by row for maps whose rows are groups, by column for o and down."""
    site = base.sites[m.name]
    assert site.A is not None
    assert site.B is not None
    a, b, weight = site.A.detach(), site.B.detach(), site.base.dense()
    ga, gb = grads[f"{m.name}.A"], grads[f"{m.name}.B"]
    by_column = m.role in ("o", "down")
    total = torch.zeros(site.base.in_ if by_column else site.base.out, device=a.device)
    for at in range(0, site.base.out, BLOCK):
        rows = slice(at, at + BLOCK)
        score = ((gb[rows] @ a + b[rows] @ ga) * (weight[rows] + site.scale * (b[rows] @ a))).abs_()
        if by_column:
            total += score.sum(0)
        else:
            total[rows] = score.sum(1)
    return total


@torch.no_grad()
def _activations(
    base: Base, card: ModelCard, batches: list[dict[str, Tensor]]
) -> list[tuple[Module, Tensor]]:
    """Of o and down: root of the summed squares of each input column, times the norm of the weight's
    column."""
    core = base.core
    assert core is not None
    core.seen = {}
    try:
        for batch in batches:
            base.hidden({k: t for k, t in batch.items() if k != "key"})
        seen = core.seen
    finally:
        core.seen = None
    return [
        (m, seen[m.name].sqrt() * base.sites[m.name].base.dense().norm(dim=0))
        for m in card.modules
        if m.role in ("o", "down") and m.name in seen
    ]
