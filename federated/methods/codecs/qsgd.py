"""QSGD: stochastic rounding to a few levels, unbiased (Alistarh, Grubic, Li, Tomioka, Vojnovic, 2017).

Q(v) = ‖v‖ · sign(v) · ξ(v, s) with ξ one of the two levels around s·|v|/‖v‖, chosen so that E[Q(v)] = v
(eq. 4). Scaled by the largest entry instead of the 2-norm, as the paper's experiments do (section 5), one
scale per tensor; the norm and bucket choice were reconstructed from the formula.
"""

from typing import Annotated, ClassVar, Literal

import numpy as np
from msgspec import Meta

from ...contract.contexts import ClientContext, ServerContext
from ...contract.method import Method
from ...contract.tensors import Tensors, floats, stochastic_round
from ...contract.update import Update
from ...errors import WireError


class Qsgd(Method, frozen=True):
    """Float tensors leave as i8 levels, their scales through `ctx.up`; other dtypes pass untouched."""

    codes: ClassVar[Literal["", "tensors", "floats"]] = "floats"
    evidence: ClassVar[str] = "toy-checked"
    use_when: ClassVar[str] = "dense uploads must be unbiased and a quarter of their size"

    levels: Annotated[int, Meta(ge=1, le=127, description="levels on each side of zero")] = 127

    def send(self, delta: Tensors, ctx: ClientContext) -> Tensors:
        """Levels in place of floats."""
        top = {k: np.float32(max(float(np.abs(t).max(initial=0.0)), 1e-30)) for k, t in floats(delta).items()}
        ctx.up.update({k: np.array([s], np.float32) for k, s in top.items()})
        coded = {
            k: stochastic_round(delta[k] / s * self.levels, ctx.rng).astype(np.int8) for k, s in top.items()
        }
        return {**delta, **coded}

    def wire_bits(self, numbers: float, bits: float) -> float:
        """A byte for every float; what is coded already stays as it is."""
        return min(bits, 8.0 * numbers)

    def receive(self, delta: Tensors, update: Update, ctx: ServerContext) -> Tensors:
        """Floats again."""
        top = update.extra_of(self)
        if missing := [k for k in top if k not in delta or top[k].size != 1]:
            raise WireError(f"scale without a tensor: {missing[0]}")
        return {**delta, **{k: delta[k] * (top[k][0] / np.float32(self.levels)) for k in top}}
