"""FFA-LoRA: freeze A, train and send only B (Sun, Li, Li, Ding, 2024).

With A common and fixed, the mean of B_k·A is the mean of the products: exact, half the traffic, and noise
on B is not squared (their eq. 4). Devices of lower rank use the first rows of the same A, so mixed ranks
stay exact too.
"""

from typing import ClassVar

from ...contract.contexts import ClientContext
from ...contract.method import Method


class FfaLora(Method, frozen=True):
    """`trains`: everything but A."""

    space: ClassVar[str] = "factors"
    evidence: ClassVar[str] = "toy-checked"
    use_when: ClassVar[str] = (
        "noise or secure aggregation is in the stack, or the link is slow; less expressive at small rank"
    )

    def trains(self, name: str, ctx: ClientContext) -> bool:
        """False for A."""
        return not name.endswith(".A")
