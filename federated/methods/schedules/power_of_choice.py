"""Power-of-choice: look at many devices, keep those with the highest loss (Cho, Wang, Joshi, 2022).

The variant that costs nothing (their π_rpow-d): the loss is the mean over the device's last round of local
steps, and a device that was never asked counts as infinitely bad, so everybody is asked once.
"""

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
from msgspec import Meta

from ...contract.contexts import ClientContext, Member, ServerContext, StepContext, Torch
from ...contract.method import Method
from ...contract.tensors import Tensors
from ...contract.update import Update


class PowerOfChoice(Method, frozen=True):
    """`select` the `cohort` devices with the highest reported loss."""

    evidence: ClassVar[str] = "toy-checked"
    use_when: ClassVar[str] = "there are many more devices than a round needs"

    tells: ClassVar[Literal["", "public", "private"]] = "private"
    example: ClassVar[dict[str, Any]] = {"cohort": 2}

    cohort: Annotated[int, Meta(ge=1, description="devices per round")] = 10

    def select(self, devices: Sequence[Member], ctx: ServerContext) -> Sequence[Member]:
        """Highest loss first; ties by name, so that the choice does not depend on arrival."""
        return sorted(devices, key=lambda d: (-ctx.state.get(d.device, float("inf")), d.device))[
            : self.cohort
        ]

    def begin(self, adapter: Tensors, ctx: ClientContext) -> Tensors:
        """Start a new mean."""
        ctx.state["losses"] = []
        return adapter

    def loss(
        self, loss: Torch, params: Mapping[str, Torch], batch: dict[str, Torch], ctx: StepContext
    ) -> Torch:
        """Watch the loss, leave it as it is."""
        ctx.state.setdefault("losses", []).append(float(loss.detach()))
        return loss

    def send(self, delta: Tensors, ctx: ClientContext) -> Tensors:
        """The mean loss travels beside the delta."""
        losses = ctx.state.pop("losses", [])
        if losses:
            ctx.up["loss"] = np.array([np.mean(losses)], np.float32)
        return delta

    def receive(self, delta: Tensors, update: Update, ctx: ServerContext) -> Tensors:
        """Remember it."""
        said = update.extra_of(self)
        if "loss" in said and said["loss"].size == 1:
            ctx.state[update.device] = float(said["loss"][0])
        return delta
