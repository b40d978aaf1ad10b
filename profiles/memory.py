"""How much memory an arm takes on a device, over what the runtime itself needs, and how it is made to fit:
pieces, checkpointing.

Formulas follow what the engine keeps (edge_agent/model): docs/specification.md, Memory. `make
bench-memory` compares them with measured peaks. Numbers are bytes inside, MB (1e6) outside.
"""

from collections.abc import Iterator, Mapping

import msgspec

from .card import ModelCard, Module

SHORT = 64
"""Tokens up to which attention keeps its probabilities instead of running the fused kernel."""
LOGITS, TABLE = 64e6, 16e6
"""Logits held at once, and the piece of an output table that is widened."""
BASE, SLACK, AGAIN = 28.0, 1.25, 0.58
"""MB of kernels and buffers that come with the first step; what an allocator wastes of what is held; how
much of a layer's numbers are there once more where it is computed again. Fitted to measured peaks."""
TOUCHED = 0.05
"""Share of an encoder's embeddings that a round's texts use, which alone are kept; a decoder's are its
output table too."""
WORTH = 256
"""Tokens of a micro-batch below which a product loses speed."""
LEAST = 64
"""Below so many nothing is gained: weights and kernels are all that is left."""


class StepPlan(msgspec.Struct, frozen=True):
    """How a batch is carried out. The gradient is the same, only time and memory differ."""

    memory_mb: float
    micro: int
    """Examples at once."""
    checkpointing: bool = False


def kept(size: int, ratio: float) -> int:
    """Channels that survive pruning by `ratio`, a multiple of 8 where there are that many."""
    n = round(size * (1 - ratio))
    return max(1, n if size < 16 else n // 8 * 8)


def kept_groups(groups: int, ratio: float) -> int:
    """Key-value groups of heads that survive."""
    return max(1, round(groups * (1 - ratio)))


def shape(card: ModelCard, module: Module, prune: float) -> tuple[int, int]:
    """(out, in) of a map after pruning heads and feed-forward channels."""
    out, in_ = module.out, module.in_
    share = kept_groups(card.groups, prune) / card.groups
    if module.role == "up":
        out = kept(out, prune)
    elif module.role == "down":
        in_ = kept(in_, prune)
    elif module.role in ("q", "k", "v", "qkv"):
        out = round(out * share)
    elif module.role == "o":
        in_ = round(in_ * share)
    return out, in_


def stored(out: int, in_: int, bits: int) -> float:
    """Bytes of a map: fp32, bf16, INT8 with a scale per row, NF4 with double quantisation (8 bits a block
    of 64, 32 a block of 256)."""
    weights = out * in_
    if bits >= 16:
        return weights * bits / 8
    return weights + 4.0 * out if bits == 8 else weights * (0.5 + 1 / 64 + 4 / 16384) + 4


def boundary(card: ModelCard, placement: Mapping[str, int]) -> int:
    """The lowest adapted layer: everything below runs without autograd."""
    return min((m.layer for m in card.modules if m.name in placement), default=card.layers)


def adapter_parameters(card: ModelCard, placement: Mapping[str, int], prune: float) -> int:
    """Trainable numbers of a placement (module → rank)."""
    total = 0
    for m in card.modules:
        if m.name in placement:
            out, in_ = shape(card, m, prune)
            total += placement[m.name] * (out + in_)
    return total


def weights(card: ModelCard, prune: float, bits: int, start: int = 0) -> float:
    """Bytes of the layers from `start` on."""
    return sum(
        stored(*shape(card, m, prune), bits) + 4.0 * shape(card, m, prune)[0]
        for m in card.modules
        if m.layer >= start
    )


def tables(card: ModelCard, bits: int) -> float:
    """Bytes of embeddings and what else is no layer, as far as they come into memory."""
    if not card.causal:
        return card.embedding * 4.0 * TOUCHED
    return card.embedding * (4.0 if bits == 32 else 2.0)


def activation_floats(card: ModelCard, placement: Mapping[str, int], prune: float, length: int) -> float:
    """Numbers that a token leaves in a layer for the way back (docs/specification.md, Memory)."""
    roles = {m.role for m in card.modules if m.name in placement}
    ups, _ = card.channels(0)
    share = kept_groups(card.groups, prune) / card.groups
    inner = card.heads * card.head_size * share
    keys = card.groups * card.head_size * share
    f = kept(card.ffn, prune)
    gated = len(ups) > 1
    short = length <= SHORT
    attention = inner + 2 * keys + card.heads * share * length if short else 4 * inner + card.heads * share
    total = attention + 2 * card.hidden + (2 if gated else 1) * f
    total += card.hidden if roles & {"q", "k", "v", "qkv", "attention"} else 0
    total += inner if "o" in roles and short else 0
    total += (card.hidden if "up" in roles else 0) + (f if "down" in roles else 0)
    return total + sum(placement.values()) / max(1, card.layers - boundary(card, placement))


def peak_mb(
    card: ModelCard, placement: Mapping[str, int], prune: float, bits: int, micro: int, length: int,
    head: int = 0, *,
    checkpointing: bool = False, cached: bool = False,
) -> float:  # fmt: skip
    """Peak over the runtime's own need, MB: weights, tables, adapter with gradient and moments,
    activations, what is there for a moment.

    `cached`: layers below the boundary have left memory.
    """
    start = boundary(card, placement)
    fixed = weights(card, prune, bits, start if cached else 0) + (
        0.0 if cached and not card.causal else tables(card, bits)
    )
    fixed += 16.0 * (adapter_parameters(card, placement, prune) + head)
    tokens, width = micro * length, 2.0 if bits == 16 else 4.0
    deep = card.layers - start
    layer = activation_floats(card, placement, prune, length) * width
    held = tokens * (deep * 4.0 * card.hidden + layer if checkpointing else deep * layer)
    moment = tokens * width * (4 * card.hidden + 2 * kept(card.ffn, prune))
    moment += AGAIN * tokens * layer if checkpointing else 0.0
    if bits < 16:
        moment += 4.0 * max(o * i for o, i in (shape(card, m, prune) for m in card.of_layer(0)))
    if card.causal:
        moment += (
            min(LOGITS, 4.0 * tokens * card.vocab)
            + (TABLE if bits < 32 else 0.0)
            + tokens * card.hidden * 4.0
        )
    return BASE + (fixed + SLACK * held + moment) / 1e6


def ways(batch: int, length: int) -> Iterator[tuple[int, bool]]:
    """(micro, checkpointing), the fastest first."""
    sizes = [batch]
    while sizes[-1] > 1:
        sizes.append(-(-sizes[-1] // 2))
    large = [n for n in sizes if n == batch or n * length >= WORTH]
    small = [n for n in sizes if n < large[-1] and n * length >= LEAST]
    yield from ((n, False) for n in large)
    yield large[-1], True
    yield from ((n, True) for n in small)


def step_plan(
    card: ModelCard, placement: Mapping[str, int], prune: float, bits: int, batch: int, length: int,
    head: int = 0,
    budget_mb: float = 0.0, again: bool = True,
) -> StepPlan:  # fmt: skip
    """The fastest way to carry a batch out in `budget_mb`; the leanest one where none fits. `again`: may
    layers be computed twice?"""
    found, length = StepPlan(float("inf"), 1), card.image_tokens or length
    for micro, checkpointing in ways(batch, length):
        if checkpointing and not again:
            continue
        need = peak_mb(card, placement, prune, bits, micro, length, head, checkpointing=checkpointing)
        if need < found.memory_mb:
            found = StepPlan(need, micro, checkpointing)
        if found.memory_mb <= budget_mb:
            break
    return found


def memory_mb(
    card: ModelCard,
    placement: Mapping[str, int],
    prune: float,
    bits: int,
    batch: int,
    length: int,
    head: int = 0,
) -> float:
    """What the leanest way needs, MB."""
    return step_plan(card, placement, prune, bits, batch, length, head).memory_mb
