"""APFL: a device serves α·v + (1 - α)·w of its own and the shared adapter, and learns α (Deng, Kamani,
Mahdavi, 2020).

w ← w - η∇f(w); v ← v - ηα∇f(v̄) at v̄ = αv + (1 - α)w; α ← α - η⟨v - w, ∇f(v̄)⟩ within [0, 1], at the
first step of a round (their algorithm 1 and eq. 11). Tensor by tensor, in factor coordinates: that is not
mixing ΔW.
"""

from typing import Annotated, ClassVar

from msgspec import Meta

from ...contract.contexts import ClientContext, StepContext, Torch
from ...contract.method import Method
from ...contract.tensors import Array, Tensors


class Apfl(Method, frozen=True):
    """`train` moves w, v and α, `serve` mixes."""

    plain: ClassVar[bool] = True
    evidence: ClassVar[str] = "toy-checked"
    use_when: ClassVar[str] = (
        "each device should find out how much of its own it needs; costs twice the passes"
    )

    alpha: Annotated[float, Meta(ge=0, le=1, description="α at the start")] = 0.5

    def train(self, start: dict[str, Torch], ctx: StepContext) -> dict[str, Torch]:
        """w, v and α, step by step."""
        own, alpha = ctx.state.get("own", {}), float(ctx.state.get("alpha", self.alpha))
        w = dict(start)
        v = {
            k: t.new_tensor(own[k]) if k in own and own[k].shape == tuple(t.shape) else t
            for k, t in start.items()
        }
        for step, batch in enumerate(ctx.batches()):
            _, shared = ctx.gradient(w, batch)
            _, mixed = ctx.gradient({k: alpha * v[k] + (1 - alpha) * w[k] for k in w}, batch)
            if step == 0:
                slope = sum(float(((v[k] - w[k]) * g).sum()) for k, g in mixed.items())
                alpha = min(1.0, max(0.0, alpha - ctx.lr * slope))
            w = {k: t - ctx.lr * shared[k] for k, t in w.items()}
            v = {k: t - ctx.lr * alpha * mixed[k] for k, t in v.items()}
        ctx.state["own"] = {k: t.detach().cpu().numpy() for k, t in v.items()}
        ctx.state["alpha"] = alpha
        return w

    def serve(self, adapter: Tensors, ctx: ClientContext) -> Tensors:
        """The mixture, where there is anything to mix."""
        own, a = ctx.state.get("own", {}), float(ctx.state.get("alpha", self.alpha))

        def mixed(t: Array, v: Array | None) -> Array:
            return t if v is None or v.shape != t.shape else (a * v + (1 - a) * t).astype(t.dtype)

        return {k: mixed(t, own.get(k)) for k, t in adapter.items()}
