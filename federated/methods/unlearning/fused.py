"""FUSED: forget devices or a class by training a sparse adapter over the frozen one, without them (Zhong
et al., 2025).

The job says `start: JOB` and `frozen: true`: what was learnt becomes a carry, and this job's own adapter
begins at zero. First all layers are trained and only looked at: layer l moves by the mean over its holders
of ‖θ_i - θ‖₁ (their critical layer identification). Then the K layers that moved most are trained, and of
their numbers a seeded share. Heads stand still, so without this job's pairs the old adapter is back, bit
for bit. Reconstructed: the mask lies on both factors of a pair; examples of a class are left out, where
their code relabels them. Devices measure versions with all that they keep aside: after a class is
forgotten, `coordinator promote` decides.
"""

import zlib
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar

import numpy as np
from msgspec import Meta

from ...contract.contexts import Ask, ClientContext, Member, ServerContext, StepContext, Torch
from ...contract.method import Method
from ...contract.spec import module_of
from ...contract.tensors import Array
from ...errors import Refused


class Fused(Method, frozen=True):
    """`select` and `data` leave out, `step` finds the critical layers, `plan` places, `grad` keeps it
    sparse."""

    space: ClassVar[str] = "factors"
    needs_all: ClassVar[bool] = True
    evidence: ClassVar[str] = "toy-checked"
    use_when: ClassVar[str] = (
        "somebody withdraws from a finished job; it can be undone, since the old adapter stays as it is"
    )

    devices: Annotated[tuple[str, ...], Meta(description="devices that are to be forgotten")] = ()
    label: Annotated[
        int,
        Meta(ge=-1, description="place of a class that is to be forgotten in the job's `labels`; -1: none"),
    ] = -1
    layers: Annotated[int, Meta(ge=1, description="K, critical layers")] = 1
    keep: Annotated[
        float, Meta(gt=0, le=1, description="share of a critical layer's numbers that may move")
    ] = 0.5

    def select(self, devices: Sequence[Member], ctx: ServerContext) -> Sequence[Member]:
        """Those that stay."""
        return [d for d in devices if d.device not in self.devices]

    def plan(self, ask: Ask, device: str, ctx: ServerContext) -> Ask:
        """Critical layers, once they are known; everything where an arm holds none of them, which `step`
        then leaves out."""
        if "critical" not in ctx.state:
            return ask
        critical = {m: r for m, r in ask["placement"].items() if ctx.maps[m].layer in ctx.state["critical"]}
        return {**ask, "placement": critical or ask["placement"]}

    def trains(self, name: str, ctx: ClientContext) -> bool:
        """Pairs alone."""
        return name.endswith((".A", ".B"))

    def data(self, examples: list[dict[str, Any]], ctx: StepContext) -> list[dict[str, Any]]:
        """What stays. Raises Refused where that is nothing."""
        left = [e for e in examples if self.label < 0 or e.get("label") != self.label]
        if not left:
            raise Refused(
                f"every example has label {self.label}, which `fused` forgets",
                "name the device in its `devices`",
            )
        return left

    def grad(self, grad: dict[str, Torch], params: Mapping[str, Torch], ctx: StepContext) -> dict[str, Torch]:
        """The rest stands still from the optimiser's first step on: its moments are zero."""
        return {k: g * g.new_tensor(mask(k, tuple(g.shape), self.keep)) for k, g in grad.items()}

    def step(self, change: Mapping[str, Any], ctx: ServerContext) -> Mapping[str, Any]:
        """First a look, and nothing moves; then numbers within the mask of critical layers, whatever
        arrives."""
        if "critical" not in ctx.state:
            lengths = moved({m: ctx.maps[m].layer for m in ctx.maps}, ctx)
            ctx.state["critical"] = sorted(sorted(lengths, key=lambda n: (-lengths[n], n))[: self.layers])
            return {}
        inside = {
            k for k in change if k != module_of(k) and ctx.maps[module_of(k)].layer in ctx.state["critical"]
        }
        return {k: t * mask(k, t.shape, self.keep).astype(t.dtype) for k, t in change.items() if k in inside}


def moved(layers: Mapping[str, int], ctx: ServerContext) -> dict[int, float]:
    """Layer → mean over the devices that hold it of how far its numbers moved, ‖θ_i - θ‖₁."""
    lengths: dict[int, list[float]] = {}
    for update in ctx.updates:
        own: dict[int, float] = {}
        for module in update.modules():
            length = sum(float(np.abs(d).sum()) for d in update.deltas(module))
            own[layers[module]] = own.get(layers[module], 0.0) + length
        for layer, length in own.items():
            lengths.setdefault(layer, []).append(length)
    return {layer: float(np.mean(each)) for layer, each in lengths.items()}


def mask(name: str, shape: tuple[int, ...], keep: float) -> Array:
    """1 where a factor's number may move, else 0: seeded by name and slot, so a smaller rank has a larger
    one's first slots."""
    slots, width = shape if name.endswith(".A") else shape[::-1]
    drawn = [
        np.random.default_rng([zlib.crc32(name.encode()), slot]).random(width) < keep for slot in range(slots)
    ]
    rows = np.array(drawn, np.float32).reshape(slots, width)
    return rows if name.endswith(".A") else rows.T
