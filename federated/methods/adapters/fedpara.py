"""FedPara: ΔW = (B₁A₁)∘(B₂A₂), of rank up to R² with the numbers of rank 2R (Hyeon-Woo, Ye-Bin, Oh, 2022).

A Hadamard product of two low-rank products is itself one: B = B₁ ⋆ B₂ (rows: all products of a row's
entries), A = A₁ ∗ A₂ (likewise by columns). B₂ starts at zero. `private` takes B₂A₂ + 1 in place of B₂A₂
and keeps it on the device (pFedPara), starting with B₁ zero.
"""

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar

import numpy as np
from msgspec import Meta

from ...contract.contexts import Ask, ClientContext, ServerContext, Tensor
from ...contract.method import Method
from ...contract.spec import Spec


class FedPara(Method, frozen=True):
    """`tensors` declares four factors a map, `express` makes the pair."""

    evidence: ClassVar[str] = "toy-checked"
    use_when: ClassVar[str] = "rank matters more than bytes; averaging is not exact in ΔW"

    rank: Annotated[int, Meta(ge=1, description="R; the product has rank R²")] = 2
    private: bool = False

    def plan(self, ask: Ask, device: str, ctx: ServerContext) -> Ask:
        """Maps without factors of their own."""
        return {**ask, "rank": 0}

    def tensors(self, spec: Spec, ctx: ServerContext) -> dict[str, Tensor]:
        """A₁, A₂ by He, one B by He and the other zero."""
        tensors = {}
        for name, p in spec.pairs.items():
            for n, zero in (("1", self.private), ("2", not self.private)):
                tensors[f"{name}.A{n}"] = Tensor(ctx.rng.standard_normal((self.rank, p.in_)) / p.in_**0.5)
                tensors[f"{name}.B{n}"] = Tensor(
                    np.zeros((p.out, self.rank)) if zero else ctx.rng.standard_normal((p.out, self.rank))
                )
        return tensors

    def express(self, params: Mapping[str, Any], spec: Spec, xp: Any) -> dict[str, Any]:
        """B₁ ⋆ B₂ and A₁ ∗ A₂; with + 1, the pair of B₁A₁ beside them."""
        pairs = {}
        for name, p in spec.pairs.items():
            a1, a2, b1, b2 = (params[f"{name}.{k}"] for k in ("A1", "A2", "B1", "B2"))
            b = xp.reshape(b1[:, :, None] * b2[:, None, :], (p.out, -1))
            a = xp.reshape(a1[:, None, :] * a2[None, :, :], (-1, p.in_))
            pairs[f"{name}.B"] = xp.concatenate([b, b1], 1) if self.private else b
            pairs[f"{name}.A"] = xp.concatenate([a, a1], 0) if self.private else a
        return pairs

    def travels(self, name: str, ctx: ClientContext) -> bool:
        """pFedPara: X₂, Y₂ stay."""
        return not (self.private and name.endswith((".A2", ".B2")))
