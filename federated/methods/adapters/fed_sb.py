"""Fed-SB: ΔW = s·B·R·A with B and A common and frozen, only R (r × r) is trained and sent (Singhal et al.,
2025).

Averaging R is exact: Σ p_k B R_k A = B (Σ p_k R_k) A. B and A are seeded and orthonormal here; theirs come
from the SVD of a first step's gradient, which nobody may pool.
"""

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar

import numpy as np
from msgspec import Meta

from ...contract.contexts import Ask, ServerContext, Tensor
from ...contract.method import Method
from ...contract.spec import Spec


class FedSb(Method, frozen=True):
    """`tensors` declares R and the common B and A, `express` makes the pair."""

    space: ClassVar[str] = "factors"
    evidence: ClassVar[str] = "toy-checked"
    use_when: ClassVar[str] = "bytes or noise decide: r² numbers a map, however wide it is"

    rank: Annotated[int, Meta(ge=1, description="r")] = 8

    def plan(self, ask: Ask, device: str, ctx: ServerContext) -> Ask:
        """Maps without factors of their own."""
        return {**ask, "rank": 0}

    def tensors(self, spec: Spec, ctx: ServerContext) -> dict[str, Tensor]:
        """R = 0; B and A are had, not trained."""
        tensors = {}
        for name, p in spec.pairs.items():
            r = min(self.rank, p.out, p.in_)
            tensors[f"{name}.R"] = Tensor(np.zeros((r, r)))
            for side, n in (("left", p.out), ("right", p.in_)):
                tensors[f"{name}.{side}"] = Tensor(
                    np.linalg.qr(ctx.rng.standard_normal((n, r)))[0], trained=False
                )
        return tensors

    def express(self, params: Mapping[str, Any], spec: Spec, xp: Any) -> dict[str, Any]:
        """B·R and A."""
        pairs = {}
        for name in spec.pairs:
            pairs[f"{name}.B"] = params[f"{name}.left"] @ params[f"{name}.R"]
            pairs[f"{name}.A"] = params[f"{name}.right"].T
        return pairs
