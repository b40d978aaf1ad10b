"""FedBuff: close the round after `size` arrivals and discount stale updates (Nguyen et al., 2022).

An update that is `age` versions old weighs 1/√(1 + age) (their section 5, polynomial staleness with exponent 1/2, as in
Xie et al., 2019).
"""

from dataclasses import replace
from typing import Annotated, ClassVar

from msgspec import Meta

from ...contract.method import Method, ServerContext
from ...contract.update import Update


class FedBuff(Method, frozen=True):
    """`ready` at `size` arrivals; `admit` discounts by age."""

    evidence: ClassVar[str] = "toy-checked"
    use_when: ClassVar[str] = "devices differ much in speed or sleep often"

    size: Annotated[int, Meta(ge=1, description="arrivals that close a round")] = 4

    def ready(self, arrived: int, invited: int, ctx: ServerContext) -> bool:
        """The buffer is full, or everybody is there."""
        return arrived >= min(self.size, invited)

    def admit(self, updates: list[Update], ctx: ServerContext) -> list[Update]:
        """Weight / √(1 + age)."""
        return [replace(u, weight=u.weight / (1 + u.age) ** 0.5) for u in updates]
