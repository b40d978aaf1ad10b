"""FedRand: in each round one factor of LoRA leaves a device, by lot; the other stays private (Park et al.,
2025).

Each device draws each round; with probability ρ the public factor is A, else B. The public one starts from
what arrived, the private one from the device's own of the round before (in its first round: from what
arrived, since both start from a shared seed). Both are trained, the public one is sent, and each is
averaged over those who sent it (their figure 2). One lot for all maps of a device, as in the paper.
Reconstructed: heads always travel, and both factors are offered, so bytes are halved upwards alone.
"""

from typing import Annotated, ClassVar

import numpy as np
from msgspec import Meta

from ...contract.contexts import ClientContext
from ...contract.method import Method


class FedRand(Method, frozen=True):
    """`travels`: A or B, by lot, each device its own."""

    space: ClassVar[str] = "factors"
    evidence: ClassVar[str] = "toy-checked"
    use_when: ClassVar[str] = (
        "membership shall be harder to tell from an upload, at half the bytes; no formal guarantee"
    )

    share: Annotated[float, Meta(ge=0, le=1, description="ρ, how often A is the public factor")] = 0.5
    seed: Annotated[int, Meta(ge=0, description="of the lots")] = 0

    def travels(self, name: str, ctx: ClientContext) -> bool:
        """The factor that the lot fell on, and heads."""
        return not name.endswith((".A", ".B")) or name.endswith(self.public(ctx.device, ctx.round.number))

    def public(self, device: str, number: int) -> str:
        """The factor that leaves a device in a round; the same whenever it is asked."""
        lot = np.random.default_rng([self.seed, number, *device.encode()]).random()
        return ".A" if lot < self.share else ".B"
