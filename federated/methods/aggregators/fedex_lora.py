"""FedEx-LoRA: average A and B apart, and keep what that loses beside the base (Singhal, Ponkshe,
Vepakomma, 2024).

Σ p_k B_k A_k - B̄ Ā = Σ p_k (B_k - B̄)(A_k - Ā) exactly (their eq. 4, in the form of a covariance). They
fold it into the base; here all devices apply it frozen as a low-rank carry, since a base of few bits
cannot take it. B̄ and Ā are holder-normalised as the engine's mean is, so the sum is exact where all
devices train all maps at one rank.
"""

from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np

from ...contract.contexts import ServerContext
from ...contract.method import Method
from ...contract.update import LowRank


class FedExLora(Method, frozen=True):
    """`step`: the residual of the mean goes into the carry."""

    space: ClassVar[str] = "factors"
    needs_all: ClassVar[bool] = True
    evidence: ClassVar[str] = "toy-checked"
    use_when: ClassVar[str] = "aggregation must be exact and all devices use one rank; more bytes down"

    def step(self, change: Mapping[str, Any], ctx: ServerContext) -> Mapping[str, Any]:
        """The means as they are; Σ p_k (dB_k - dB̄)(dA_k - dĀ) beside them."""
        total = sum(u.weight for u in ctx.updates)
        for module in sorted({m for u in ctx.updates for m in u.modules()}):
            pair = ctx.adapter.pairs[module]
            db, da = (
                change.get(f"{module}.{side}", np.zeros_like(t)) for side, t in (("B", pair.B), ("A", pair.A))
            )
            deltas = [
                (u.weight / total * u.spec.pairs[module].scale, *u.deltas(module))
                for u in ctx.updates
                if u.holds(module)
            ]
            left = np.concatenate([p * (own - db) for p, own, _ in deltas], axis=1)
            ctx.carry[module] = LowRank(left, np.concatenate([own - da for _, _, own in deltas], axis=0))
        return change
