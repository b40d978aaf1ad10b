"""FedIT: average A and B apart, weighted by examples (Zhang et al., 2024, "Towards Building the Federated
GPT").

The mean of products differs from the product of means by -Σ_{k<j} p_k p_j (B_k-B_j)(A_k-A_j), second order
in how far devices drift apart and large for mixed ranks (docs/specification.md). Kept as the field's
baseline; short factors are padded with zeros, so a slot that few devices hold shrinks, as in the released
code.
"""

from collections.abc import Sequence
from typing import ClassVar

import numpy as np

from ...contract.contexts import ServerContext
from ...contract.method import Method
from ...contract.tensors import Array, Tensors
from ...contract.update import Update


class FedIT(Method, frozen=True):
    """`reduce`: Σ p_k ΔA_k and Σ p_k ΔB_k, padded to the largest rank that arrived."""

    space: ClassVar[str] = "factors"
    evidence: ClassVar[str] = "toy-checked"
    use_when: ClassVar[str] = "you need the baseline that papers compare with"

    def reduce(self, updates: Sequence[Update], ctx: ServerContext) -> Tensors:
        """Padded element-wise weighted mean, in fp64, in the order given."""
        total = sum(u.weight for u in updates)
        out: Tensors = {}
        for u in updates:
            for name in u.delta:
                part = canonical(u, name) * (u.weight / total)
                out[name] = padded_sum(out[name], part, name) if name in out else part
        return {k: t.astype(np.float32) for k, t in out.items()}


def canonical(update: Update, name: str) -> Array:
    """One tensor of an update in canonical coordinates, fp64."""
    array = update.delta[name].astype(np.float64)
    pair = update.spec.pairs.get(name[:-2])
    if pair is None:
        return array
    return (
        update.rows(name[:-2], array, pair.out)
        if name.endswith(".B")
        else update.columns(name[:-2], array, pair.in_)
    )


def padded_sum(a: Array, b: Array, name: str) -> Array:
    """`a + b` of two factors whose ranks may differ: the shorter one is extended with zeros."""
    axis = 1 if name.endswith(".B") else 0
    small, large = (a, b) if a.shape[axis] <= b.shape[axis] else (b, a)
    out: Array = large.copy()
    out[(slice(None), slice(small.shape[1])) if axis else slice(small.shape[0])] += small
    return out
