"""FedBuff: close the round after `size` arrivals and discount stale updates (Nguyen et al., 2022).

An update that is `age` versions old weighs 1/√(1 + age) (their section 5, polynomial staleness with
exponent 1/2, as in Xie et al., 2019).
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Annotated, Any, ClassVar

from msgspec import Meta

from ...contract.contexts import Arrival, ServerContext
from ...contract.method import Method
from ...contract.update import Update


class FedBuff(Method, frozen=True):
    """`ready` at `size` arrivals; `weigh` discounts by age."""

    evidence: ClassVar[str] = "toy-checked"
    use_when: ClassVar[str] = "devices differ much in speed or sleep often"

    timed: ClassVar[bool] = True
    example: ClassVar[dict[str, Any]] = {"size": 2}

    size: Annotated[int, Meta(ge=1, description="arrivals that close a round")] = 4

    def ready(
        self, arrived: Sequence[Arrival], out: Sequence[str], elapsed: float, ctx: ServerContext
    ) -> bool:
        """The buffer is full, or everybody is there."""
        return len(arrived) >= self.size or not out

    def weigh(self, update: Update, ctx: ServerContext) -> Update:
        """Weight / √(1 + age)."""
        return replace(update, weight=update.weight / (1 + update.age) ** 0.5)
