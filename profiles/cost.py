"""What an arm costs on a device: FLOPs, bytes on the link, seconds; and its memory, by `memory`.

Formulas of docs/specification.md (FLOPs and seconds).
"""

from collections.abc import Callable, Mapping

import msgspec

from .card import ModelCard
from .device import DeviceProfile
from .memory import StepPlan, adapter_parameters, boundary, shape, step_plan


class Price(msgspec.Struct, frozen=True):
    """What one round of an arm needs."""

    memory_mb: float
    seconds: float
    flops: float
    up_bytes: float
    down_bytes: float


def layer_parameters(card: ModelCard, prune: float) -> float:
    """Weights of one layer, pruned."""
    return sum(o * i for o, i in (shape(card, m, prune) for m in card.of_layer(0)))


def step_flops(
    card: ModelCard,
    placement: Mapping[str, int],
    prune: float,
    batch: int,
    length: int,
    *,
    cached: bool = False,
    checkpointing: bool = False,
) -> float:
    """FLOPs of one training step: L·F forward (d·F with a cache), d·F for input gradients, three passes
    through the adapter."""
    tokens = batch * length
    layer = 2 * layer_parameters(card, prune) + 4 * length * card.hidden
    deep = card.layers - boundary(card, placement)
    head = 4.0 * card.hidden * card.vocab if card.causal else 0.0
    forward = (deep if cached else card.layers) + (deep if checkpointing else 0)
    return tokens * (forward * layer + deep * layer + 6 * adapter_parameters(card, placement, prune) + head)


FRAME = 400
"""Bytes of an upload or a view beside its numbers."""


def plain_bits(numbers: float) -> float:
    """An upload without a codec: fp32."""
    return 32.0 * numbers


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
    wire_bits: Callable[[float], float] = plain_bits,
    correction: float = 1.0,
    how: StepPlan | None = None,
) -> Price:
    """Everything at once. `wire_bits`: what the stack's codecs make of so many numbers; `correction`: the
    device's measured over predicted time so far; `how`: the way that the memory leaves."""
    length = card.image_tokens or length
    how = how or step_plan(card, placement, prune, bits, batch, length, head, profile.budget_mb)
    flops = step_flops(card, placement, prune, batch, length, checkpointing=how.checkpointing)
    rate = profile.gflops.get(str(bits)) or min(profile.gflops.values())
    dequantise = 0.0
    if bits < 16:
        dequantise = card.layers * layer_parameters(card, prune) * 8 / (profile.memory_gbps * 1e9)
    step_s = flops / (rate * 1e9) + dequantise + profile.step_overhead_ms / 1e3
    numbers = adapter_parameters(card, placement, prune) + head
    up, down = wire_bits(numbers) / 8 + FRAME, numbers * 2.0 + FRAME
    link = up * 8 / (profile.up_kbps * 1e3) + down * 8 / (profile.down_kbps * 1e3)
    return Price(
        how.memory_mb,
        correction * (profile.overhead_s + steps * step_s) + link,
        steps * flops,
        up,
        down,
    )
