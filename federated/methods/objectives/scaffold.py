"""SCAFFOLD: correct client drift with control variates (Karimireddy, Kale, Mohri, Reddi, Stich, Suresh,
2020).

Local step g - c_i + c (eq. 3). New variate by option II of eq. 4: c_i⁺ = c_i - c + (x - y_i)/(Kη). Under
plain SGD the last term is the mean of the corrected gradients, so c_i⁺ is the mean of the raw ones; that
form is used here, because it also holds for any other local optimiser. Server: c ← c + (1/N) Σ (c_i⁺ -
c_i), N the whole fleet.
"""

from collections.abc import Mapping
from typing import ClassVar, Literal

import numpy as np

from ...contract.contexts import ClientContext, ServerContext, StepContext, Torch
from ...contract.method import Method
from ...contract.tensors import Tensors, fill
from ...contract.update import Update


class Scaffold(Method, frozen=True):
    """c_i stays on the device, c at the coordinator; c and the change of c_i travel."""

    space: ClassVar[str] = "factors"
    evidence: ClassVar[str] = "toy-checked"
    use_when: ClassVar[str] = (
        "labels are skewed, all devices use one rank and no pruning, and bytes are cheap"
    )

    tells: ClassVar[Literal["", "public", "private"]] = "private"

    def offer(self, adapter: Tensors, device: str, ctx: ServerContext) -> Tensors:
        """c, restricted to what the device holds, beside the adapter."""
        have: Tensors = ctx.state.get("c", {})
        ctx.down.update({k: have[k] for k, t in adapter.items() if k in have and have[k].shape == t.shape})
        return adapter

    def begin(self, adapter: Tensors, ctx: ClientContext) -> Tensors:
        """Forget the gradients of an attempt that was cut off."""
        ctx.state.pop("sum", None)
        return adapter

    def grad(self, grad: dict[str, Torch], params: Mapping[str, Torch], ctx: StepContext) -> dict[str, Torch]:
        """g - c_i + c; the raw gradient is summed on the way."""
        total: Tensors = ctx.state.setdefault("sum", {})
        ctx.state["count"] = ctx.state.get("count", 0) + 1 if total else 1
        own: Tensors = ctx.state.get("c", {})
        out = {}
        for k, g in grad.items():
            raw = g.detach().cpu().numpy()
            total[k] = total[k] + raw if k in total else raw.copy()
            correction: Torch = ctx.down.get(k, 0.0)
            if k in own and own[k].shape == raw.shape:
                correction = correction - g.new_tensor(own[k])
            out[k] = g + correction
        return out

    def send(self, delta: Tensors, ctx: ClientContext) -> Tensors:
        """The change of c_i leaves beside the delta."""
        total: Tensors = ctx.state.pop("sum", {})
        count = max(1, ctx.state.pop("count", 1))
        new = {k: (t / count).astype(np.float32) for k, t in total.items()}
        own = fill(ctx.state.get("c"), new)
        ctx.up.update({k: new[k] - own[k] if own[k].shape == new[k].shape else new[k] for k in new})
        ctx.state["c"] = {**ctx.state.get("c", {}), **new}
        return delta

    def admit(self, updates: list[Update], ctx: ServerContext) -> list[Update]:
        """c moves by the sum of changes over the size of the fleet."""
        c: Tensors = ctx.state.setdefault("c", {})
        for u in updates:
            for k, change in u.extra_of(self).items():
                part = (change / max(ctx.enrolled, len(updates))).astype(np.float32)
                c[k] = c[k] + part if k in c and c[k].shape == part.shape else part
        return updates
