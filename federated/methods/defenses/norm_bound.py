"""Norm bounding: no device may move the adapter further than `factor` times the median one (Sun et al.,
2019).

The norm is that of the whole update, in product space ‖s(B₁A₁ - B₀A₀)‖ from the factors. The paper bounds
by a constant; the median of the round as bound is our choice, so that no unit has to be guessed.
"""

from statistics import median
from typing import Annotated, ClassVar

from msgspec import Meta

from ...contract.contexts import ServerContext
from ...contract.method import Method
from ...contract.update import Update


class NormBound(Method, frozen=True):
    """`admit`: scale long updates down."""

    evidence: ClassVar[str] = "toy-checked"
    use_when: ClassVar[str] = "some devices may be broken or hostile; cheap, and harmless otherwise"

    factor: Annotated[float, Meta(gt=0, description="bound, in medians of the round")] = 3.0

    def admit(self, updates: list[Update], ctx: ServerContext) -> list[Update]:
        """Updates longer than the bound, cut to it."""
        norms = [u.norm() for u in updates]
        if not norms:
            return updates
        bound = self.factor * median(norms)
        return [u.scale(bound / n) if n > bound else u for u, n in zip(updates, norms, strict=True)]
