"""One order of importance for the heads and the feed-forward channels of each layer, so that every pruning
ratio is nested in the next.

Importance is the product of a group's norms on its way in and out, ‖W_up[j]‖·‖W_down[:, j]‖, summed over
gated maps; of heads, ‖W_v[j]‖·‖W_o[:, j]‖ of a key-value head and the query heads that go with it: what
can be known before the first round, without data (docs/specification.md, Pruning: a fair start). Every
layer keeps as many as the others, so that a plain configuration describes it.
"""

from pathlib import Path

import msgspec
import numpy as np

from rankfleet.federated.contract.tensors import Array
from rankfleet.federated.contract.update import Masks
from rankfleet.federated.errors import WireError
from rankfleet.profiles.card import Entry, ModelCard, Module, entries
from rankfleet.profiles.memory import kept, kept_groups


class Importance(msgspec.Struct):
    """Layer → score of every feed-forward channel, and of every key-value group of heads; fp64."""

    channels: dict[int, Array]
    heads: dict[int, Array]


def importance(folder: Path, card: ModelCard) -> Importance:
    """By norms of the weights, layer by layer."""
    found = {k: (file, e) for file in sorted(folder.glob("*.safetensors")) for k, e in entries(file).items()}

    def weight(m: Module) -> Array:
        file, entry = found[f"{m.name}.weight"]
        values = _read(file, entry)
        return values.T if card.family == "gpt2" else values

    channels, heads = {}, {}
    for layer in range(card.layers):
        ups, downs = card.channels(layer)
        if ups and downs:
            inward = np.sqrt(sum(np.square(weight(m)).sum(axis=1) for m in ups))
            channels[layer] = inward * np.sqrt(sum(np.square(weight(m)).sum(axis=0) for m in downs))
        by_role = {m.role: m for m in card.of_layer(layer)}
        if "o" in by_role and ("v" in by_role or "qkv" in by_role):
            v = (
                weight(by_role["v"])
                if "v" in by_role
                else weight(by_role["qkv"])[-card.groups * card.head_size :]
            )
            inward = np.square(v).reshape(card.groups, -1).sum(axis=1)
            outward = np.square(weight(by_role["o"])).sum(axis=0).reshape(card.groups, -1).sum(axis=1)
            heads[layer] = np.sqrt(inward * outward)
    return Importance(channels, heads)


def _read(file: Path, entry: Entry) -> Array:
    """A tensor, fp64; NumPy knows no bf16."""
    kinds = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2"}
    if entry.dtype not in kinds:
        raise ValueError(f"{file} holds weights as {entry.dtype}; they can be fp32, fp16 or bf16")
    stored = np.memmap(
        file, dtype=kinds[entry.dtype], mode="r", offset=entry.offset, shape=tuple(entry.shape)
    )
    if entry.dtype == "BF16":
        return (stored.astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    return np.asarray(stored, np.float64)


def masks(card: ModelCard, scores: Importance, ratio: float, groups: int | None = None) -> Masks:
    """Kept rows and columns at a ratio, as sorted int32 indices per side of a map; nested over ratios.
    `groups`: heads, if not by ratio."""
    found: Masks = {}
    if ratio <= 0:
        return found
    for layer, score in scores.channels.items():
        index = _best(score, kept(len(score), ratio))
        ups, downs = card.channels(layer)
        found |= {f"{m.name}.out": index for m in ups} | {f"{m.name}.in": index for m in downs}
    for layer, score in scores.heads.items():
        if (count := groups or kept_groups(card.groups, ratio)) < card.groups:
            found |= _head_masks(card, layer, _best(score, count))
    return found


def _best(score: Array, count: int) -> Array:
    return np.sort(np.argsort(-score, kind="stable")[:count]).astype(np.int32)


def _head_masks(card: ModelCard, layer: int, groups: Array) -> Masks:
    """Rows of q, k, v and columns of o that stay with these key-value groups."""
    each = card.heads // card.groups
    rows = _rows(groups, card.head_size)
    queries = _rows(groups, each * card.head_size)
    width = card.groups * card.head_size
    sides = {
        "q": ("out", queries), "k": ("out", rows), "v": ("out", rows), "o": ("in", queries),
        "qkv": ("out", np.concatenate([queries, width * each + rows, width * (each + 1) + rows])),
    }  # fmt: skip
    return {
        f"{m.name}.{sides[m.role][0]}": sides[m.role][1].astype(np.int32)
        for m in card.of_layer(layer)
        if m.role in sides
    }


def _rows(blocks: Array, size: int) -> Array:
    """Indices of whole blocks of `size`."""
    return (blocks[:, None] * size + np.arange(size)).reshape(-1)


def agreed(card: ModelCard, old: Importance, told: list[tuple[float, dict[str, Array]]]) -> Importance:
    """The fleet's order: what devices told (weight, `p/<kind>/<layer>` → u8), averaged; the old one where
    nobody told anything.

    Every device's scores are between 0 and 1, so none can outvote the others by size. Raises WireError for
    what has another shape.
    """
    found = Importance(dict(old.channels), dict(old.heads))
    for kind, mine in (("channels", found.channels), ("heads", found.heads)):
        for layer, before in mine.items():
            rows = [(w, t[f"p/{kind}/{layer}"]) for w, t in told if f"p/{kind}/{layer}" in t]
            if any(r.dtype != np.uint8 or r.shape != before.shape for _, r in rows):
                raise WireError(f"importance of {kind} of layer {layer} is not {len(before)} bytes")
            if total := sum(w for w, _ in rows):
                mine[layer] = np.sum(
                    [w * (r / 255.0) ** 4 for w, r in rows], axis=0, dtype=np.float64
                ).astype(np.float32) / np.float32(total)
    return found


def saved(scores: Importance) -> dict[str, dict[str, Array]]:
    """As a version keeps it."""
    return {"channels": {str(n): v.astype(np.float32) for n, v in scores.channels.items()},
            "heads": {str(n): v.astype(np.float32) for n, v in scores.heads.items()}}  # fmt: skip


def restored(state: dict[str, dict[str, Array]]) -> Importance:
    """The inverse of `saved`."""
    return Importance(
        *({int(n): np.asarray(v) for n, v in state[kind].items()} for kind in ("channels", "heads"))
    )
