"""FedProx: keep each device near the adapter it was given (Li, Sahu, Zaheer, Sanjabi, Talwalkar, Smith,
2020).

Local objective h(w) = F_k(w) + μ/2 ‖w - w^t‖² (eq. 2); its gradient adds μ(w - w^t). The squared norm is
over the trained tensors, in factor coordinates.
"""

from collections.abc import Mapping
from typing import Annotated, ClassVar

from msgspec import Meta

from ...contract.contexts import StepContext, Torch
from ...contract.method import Method


class FedProx(Method, frozen=True):
    """`grad`: + μ(w - received)."""

    evidence: ClassVar[str] = "toy-checked"
    use_when: ClassVar[str] = "devices take many local steps on very different data"

    mu: Annotated[float, Meta(ge=0, le=10, description="strength of the pull")] = 0.01

    def grad(self, grad: dict[str, Torch], params: Mapping[str, Torch], ctx: StepContext) -> dict[str, Torch]:
        """The proximal term's gradient, added."""
        return {k: g + self.mu * (params[k].detach() - ctx.received[k]) for k, g in grad.items()}
