"""FedAlt: a device trains its personal part first, then the shared part with it held fixed (Pillutla et
al., 2022).

v_i takes τ_v steps with u as it arrived, then u takes τ_u steps with the new v_i (their algorithm 3); the
coordinator averages u alone. `together` moves both at once: their FedSim.
"""

from typing import Annotated, ClassVar

from msgspec import Meta

from ...contract.contexts import ClientContext, StepContext, Torch
from ...contract.method import Method


class PartialPfl(Method, frozen=True):
    """`train`: one part after the other; `travels`: the shared one."""

    evidence: ClassVar[str] = "toy-checked"
    use_when: ClassVar[str] = (
        "labels or tastes differ between devices, and a small part (the head) can carry that"
    )

    personal: Annotated[str, Meta(description="names that begin so are personal")] = "head."
    share: Annotated[
        float, Meta(ge=0, le=1, description="share of the steps that the personal part gets")
    ] = 0.5
    together: bool = False
    """Move both parts at once."""

    def travels(self, name: str, ctx: ClientContext) -> bool:
        """Not the personal part."""
        return not self.is_own(name)

    def train(self, start: dict[str, Torch], ctx: StepContext) -> dict[str, Torch]:
        """v, then u."""
        if self.together:
            return ctx.fit(start)
        own = round(self.share * ctx.steps)
        tuned = ctx.fit(start, only=self.is_own, steps=own)
        return ctx.fit(tuned, only=lambda name: not self.is_own(name), steps=ctx.steps - own)

    def is_own(self, name: str) -> bool:
        """Is this a name of the personal part?"""
        return name.startswith(self.personal)
