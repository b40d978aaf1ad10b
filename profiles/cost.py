"""What an arm costs on a device: bytes of memory, FLOPs, bytes on the link, seconds.

Formulas of docs/specification.md (Memory; FLOPs and seconds):
fp32 activations, no checkpointing. Activations kept for the backward pass are linear in the
number of layers above the boundary and nearly flat in rank; layers below it keep nothing.
"""

import math
from collections.abc import Mapping

import msgspec

from .card import ModelCard, Module
from .device import DeviceProfile

BYTES_PER_WEIGHT = {32: 4.0, 16: 2.0, 8: 1.0 + 4 / 384, 4: 0.5 + 4 / 64}
"""Storage of a layer's weights: INT8 with one fp32 scale per row, NF4 with one per block of 64."""


class Price(msgspec.Struct, frozen=True):
    """What one round of an arm needs."""

    memory_mb: float
    seconds: float
    flops: float
    up_bytes: float
    down_bytes: float


def kept(size: int, ratio: float) -> int:
    """Channels that survive pruning by `ratio`, a multiple of 8 where there are that many."""
    n = round(size * (1 - ratio))
    return max(1, n if size < 16 else n // 8 * 8)


def shape(card: ModelCard, module: Module, prune: float) -> tuple[int, int]:
    """(out, in) of a module after feed-forward pruning."""
    out = kept(module.out, prune) if module.role == "up" else module.out
    in_ = kept(module.in_, prune) if module.role == "down" else module.in_
    return out, in_


def layer_parameters(card: ModelCard, prune: float) -> float:
    """Weights of one layer, pruned."""
    return sum(o * i for o, i in (shape(card, m, prune) for m in card.of_layer(0)))


def adapter_parameters(card: ModelCard, placement: Mapping[str, int], prune: float) -> int:
    """Trainable numbers of a placement (module → rank)."""
    total = 0
    for m in card.modules:
        if m.name in placement:
            out, in_ = shape(card, m, prune)
            total += placement[m.name] * (out + in_)
    return total


def boundary(card: ModelCard, placement: Mapping[str, int]) -> int:
    """The lowest adapted layer: everything below runs without autograd."""
    return min((m.layer for m in card.modules if m.name in placement), default=card.layers)


def activation_floats(card: ModelCard, placement: Mapping[str, int], prune: float) -> float:
    """Floats kept per token for the backward pass, over all layers above the boundary (docs/specification.md, fused attention).

    Encoder: 7h + f with adapters on attention alone, 8h + 2f with adapters on the FFN too. Gated decoder: 7h + 3f, 8h + 4f.
    """
    gated = len(card.channels(0)[0]) > 1
    wide = any(m.role in ("up", "down") for m in card.modules if m.name in placement)
    f = kept(card.ffn, prune) * ((4 if wide else 3) if gated else (2 if wide else 1))
    per_layer = (8 if wide else 7) * card.hidden + f + card.heads + 4
    return (card.layers - boundary(card, placement)) * per_layer + sum(placement.values())


def memory_mb(card: ModelCard, placement: Mapping[str, int], prune: float, bits: int, batch: int, length: int, head: int = 0) -> float:
    """Peak of weights, adapter with gradient and Adam moments, and activations, in MB (without the runtime itself)."""
    weights = card.layers * layer_parameters(card, prune) * BYTES_PER_WEIGHT[bits]
    weights += card.embedding * (4.0 if bits == 32 else 2.0)
    trained = 16.0 * (adapter_parameters(card, placement, prune) + head)
    tokens = batch * length
    working = tokens * (4 * card.hidden + kept(card.ffn, prune)) * 4.0
    if bits < 16:
        working += 4.0 * max(o * i for o, i in (shape(card, m, prune) for m in card.of_layer(0)))
    logits = 10.0 * tokens * card.vocab if card.causal else 0.0
    return (weights + trained + tokens * activation_floats(card, placement, prune) * 4.0 + working + logits) / 1e6


def step_flops(card: ModelCard, placement: Mapping[str, int], prune: float, batch: int, length: int) -> float:
    """FLOPs of one training step: L·F forward, d·F for input gradients, three passes through the adapter."""
    tokens = batch * length
    layer = 2 * layer_parameters(card, prune) + 4 * length * card.hidden
    deep = card.layers - boundary(card, placement)
    head = 4.0 * card.hidden * card.vocab if card.causal else 0.0
    return tokens * (card.layers * layer + deep * layer + 6 * adapter_parameters(card, placement, prune) + head)


def upload_bytes(numbers: int, keep: float, value_bits: int = 8) -> float:
    """Entropy-coded index plus values, with 5% and 400 bytes for framing."""
    if keep >= 1:
        return numbers * 4.0 + 400
    entropy = -keep * math.log2(keep) - (1 - keep) * math.log2(1 - keep)
    return numbers * (entropy + keep * value_bits) / 8 * 1.05 + 400


def price(
    card: ModelCard,
    profile: DeviceProfile,
    placement: Mapping[str, int],
    *,
    prune: float,
    bits: int,
    batch: int,
    steps: int,
    length: int,
    head: int = 0,
    keep: float = 0.25,
    correction: float = 1.0,
) -> Price:
    """Everything at once. `correction` is the device's measured over predicted time so far."""
    flops = step_flops(card, placement, prune, batch, length)
    rate = profile.gflops.get(str(bits)) or min(profile.gflops.values())
    dequantise = 0.0
    if bits < 16:
        dequantise = card.layers * layer_parameters(card, prune) * 8 / (profile.memory_gbps * 1e9)
    step_s = flops / (rate * 1e9) + dequantise + profile.step_overhead_ms / 1e3
    numbers = adapter_parameters(card, placement, prune) + head
    up, down = upload_bytes(numbers, keep), numbers * 2.0 + 400
    link = up * 8 / (profile.up_kbps * 1e3) + down * 8 / (profile.down_kbps * 1e3)
    return Price(
        memory_mb(card, placement, prune, bits, batch, length, head),
        correction * (profile.overhead_s + steps * step_s) + link,
        steps * flops,
        up,
        down,
    )
