"""Ditto: beside the global adapter, train a personal one that is tied to it (Li, Hu, Beirami, Smith, 2021).

min_v F_k(v) + λ/2 ‖v - w^t‖² (eq. 2). The global adapter is trained and sent as usual; v never leaves the
device, and is what the device serves. v lives in the coordinates of its view: when they change, it starts
again from the global one.
"""

from typing import Annotated, ClassVar

from msgspec import Meta

from ...contract.contexts import ClientContext, StepContext, Torch
from ...contract.method import Method
from ...contract.tensors import Tensors


class Ditto(Method, frozen=True):
    """`train` twice, `serve` the personal one."""

    evidence: ClassVar[str] = "toy-checked"
    use_when: ClassVar[str] = "each device should get a model of its own; training costs twice as much"

    tie: Annotated[float, Meta(ge=0, le=10, description="λ, how strongly the personal adapter is tied")] = 0.1

    def train(self, start: dict[str, Torch], ctx: StepContext) -> dict[str, Torch]:
        """The global step first, then the personal one."""
        trained = ctx.fit(start)

        def tied(params: dict[str, Torch]) -> Torch:
            return self.tie / 2 * sum((params[k] - ctx.received[k]).square().sum() for k in params)

        own: Tensors = ctx.state.get("personal", {})
        personal = {
            k: t.new_tensor(own[k]) if k in own and own[k].shape == t.shape else t for k, t in start.items()
        }
        fitted = ctx.fit(personal, penalty=tied)
        ctx.state["personal"] = {k: t.detach().cpu().numpy() for k, t in fitted.items()}
        return trained

    def serve(self, adapter: Tensors, ctx: ClientContext) -> Tensors:
        """The personal adapter, where there is one."""
        own: Tensors = ctx.state.get("personal", {})
        return {k: own[k] if k in own and own[k].shape == t.shape else t for k, t in adapter.items()}
