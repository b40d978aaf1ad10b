"""Many updates to one change of the global adapter. Pure NumPy; the result does not depend on the order of
arrival.

Product space (docs/specification.md, Aggregation): ΔW ← ΔW + Σ_k w_k D⁻¹ M_k∘s(B₁A₁ - B₀A₀). Devices of
one class (rank and mask of a module) share (B₀, A₀), so the sum is (Σ w dB)·A₀ + B₀·(Σ w dA) + Σ w dB·dA:
two plain sums per class; only the last term is per device. It is kept as an operator and never as a dense
matrix, unless the matrix is small.

w_k is a device's share over all that arrived; D_j = max(Σ_k w_k [k holds the module and keeps channel j],
δ₀). So a layer or a channel that few devices hold is neither diluted by the others nor decided by one
device alone.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from rankfleet.federated.contract.tensors import Array, Tensors
from rankfleet.federated.contract.update import LowRank, Update

FLOOR = 0.2
BLOCK = 64
"""Updates that are read at once while a class is summed; bounds the memory of a module."""
DENSE = 256 * 256
"""Up to this many entries a dense fp64 accumulator and a full SVD are cheapest."""


class Term(NamedTuple):
    """rows∘(B·A)∘columns: canonical places and the normaliser are applied when the term is used."""

    B: Array
    A: Array


class Operator:
    """Σ of low-rank terms, (out, in). Terms are made on demand, so single updates may stay on disk."""

    def __init__(self, out: int, in_: int, terms: Callable[[], Sequence[Term]]) -> None:
        self.out, self.in_, self.terms = out, in_, terms

    def right(self, x: Array) -> Array:
        """G·x."""
        total = np.zeros((self.out, x.shape[1]))
        for b, a in self.terms():
            total += b @ (a @ x)
        return total

    def left(self, y: Array) -> Array:
        """Gᵀ·y."""
        total = np.zeros((self.in_, y.shape[1]))
        for b, a in self.terms():
            total += a.T @ (b.T @ y)
        return total

    def dense(self) -> Array:
        """The matrix itself; for small modules and for tests."""
        total = np.zeros((self.out, self.in_))
        for b, a in self.terms():
            total += b @ a
        return total

    def stacked(self) -> LowRank:
        """All terms as one pair."""
        terms = self.terms()
        return LowRank(
            np.concatenate([t.B for t in terms], axis=1), np.concatenate([t.A for t in terms], axis=0)
        )


def shares(updates: Sequence[Update]) -> list[float]:
    """w_k: weight over the sum of all that arrived."""
    total = sum(u.weight for u in updates)
    return [u.weight / total for u in updates]


def normaliser(holders: Iterable[tuple[Array | None, float]], size: int) -> Array:
    """D along one side of a module, (size,): what the holders (kept channels, None for all; share) of each
    weigh, at least `FLOOR`."""
    total = np.zeros(size)
    for kept, share in holders:
        total[slice(None) if kept is None else kept] += share
    return np.maximum(total, FLOOR)


def product(updates: Sequence[Update]) -> dict[str, Array | Operator]:
    """The weighted, holder-normalised sum as one operator per module, and one array per dense tensor."""
    updates = sorted(updates, key=lambda u: u.device)
    weights = shares(updates)
    out: dict[str, Array | Operator] = dict(dense_mean(updates, weights))
    for module in sorted({m for u in updates for m in u.modules()}):
        pair = next(u.spec.pairs[module] for u in updates if u.holds(module))
        out[module] = Operator(pair.out, pair.in_, _terms(module, updates, weights, pair.out, pair.in_))
    return out


def dense_mean(updates: Iterable[Update], weights: Sequence[float]) -> Tensors:
    """Σ w_k δ_k / max(Σ_holders w_k, δ₀) of tensors outside the pairs."""
    sums = Sums()
    for u, w in zip(updates, weights, strict=True):
        sums.add(u, w, (k for k in u.sent if k in u.spec.dense))
    return sums.mean()


class Sums:
    """Holder-normalised means by name, in one pass over the updates: memory is that of one adapter,
    however many devices there are."""

    def __init__(self) -> None:
        self._sums: Tensors = {}
        self._mass: dict[str, Array] = {}

    def add(self, update: Update, share: float, names: Iterable[str]) -> None:
        """One update's deltas. The slots of a factor count apart: a short one leaves those behind its rank
        to others."""
        for name in names:
            part = share * update.scaling * update.sent[name].astype(np.float64)
            axis = _slots(name, update)
            slots = 1 if axis is None else part.shape[axis]
            if name not in self._sums:
                self._sums[name], self._mass[name] = np.zeros(part.shape), np.zeros(slots)
            if slots > (have := len(self._mass[name])):
                self._mass[name] = np.pad(self._mass[name], (0, slots - have))
                self._sums[name] = np.pad(
                    self._sums[name], [(0, slots - have) if i == axis else (0, 0) for i in range(part.ndim)]
                )
            place: Any = (
                ... if axis is None else (slice(slots),) if axis == 0 else (slice(None), slice(slots))
            )
            self._sums[name][place] += part
            self._mass[name][:slots] += share

    def mean(self) -> Tensors:
        """Everything over what its holders weigh, at least `FLOOR`."""
        out: Tensors = {}
        for name, total in self._sums.items():
            mass = np.maximum(self._mass[name], FLOOR)
            out[name] = (total / (mass[:, None] if len(mass) > 1 and name.endswith(".A") else mass)).astype(
                np.float32
            )
        return out


def _slots(name: str, update: Update) -> int | None:
    """The axis of a factor's rank; None for tensors outside the pairs."""
    if name in update.spec.dense:
        return None
    return 1 if name.endswith(".B") else 0


def _terms(
    module: str, updates: Sequence[Update], weights: Sequence[float], out: int, in_: int
) -> Callable[[], Sequence[Term]]:
    rows, columns = (
        1
        / normaliser(
            (
                (u.masks.get(f"{module}.{side}"), w)
                for u, w in zip(updates, weights, strict=True)
                if u.holds(module)
            ),
            size,
        )
        for side, size in (("out", out), ("in", in_))
    )
    masked_in = any(f"{module}.in" in u.masks for u in updates)
    # Each module is masked on one side at most, so D scales that side; without masks both are the same
    # number.
    rows, columns = (np.ones(out), columns) if masked_in else (rows, np.ones(in_))
    classes: dict[tuple[str, int], list[tuple[Update, float]]] = {}
    for u, w in zip(updates, weights, strict=True):
        if u.holds(module):
            key = (u.origin or u.device, u.view[f"{module}.A"].shape[0])
            classes.setdefault(key, []).append((u, w))

    def make() -> Sequence[Term]:
        return [
            _place(members[at][0], module, *_class_sum(module, members[at : at + BLOCK]), rows, columns)
            for members in classes.values()
            for at in range(0, len(members), BLOCK)
        ]

    return make


def _class_sum(module: str, members: Sequence[tuple[Update, float]]) -> tuple[Array, Array]:
    """s·[Σ w dB | B₀ | w₁dB₁ …] and [A₀; Σ w dA; dA₁ …]: the sum over devices that share (B₀, A₀),
    compact, fp64."""
    first = members[0][0]
    a0, b0 = (first.view[f"{module}.{side}"].astype(np.float64) for side in "AB")
    deltas = [u.pair(module) for u, _ in members]
    weights = np.array([w * u.scaling for u, w in members])
    db = np.concatenate([d for d, _ in deltas], axis=1, dtype=np.float64)
    da = np.concatenate([d for _, d in deltas], axis=0, dtype=np.float64)
    rank, count = a0.shape[0], len(members)
    db *= np.repeat(weights, rank)
    sum_b = db.reshape(len(db), count, rank).sum(axis=1)
    sum_a = np.tensordot(weights, da.reshape(count, rank, -1), axes=1)
    left = np.concatenate([sum_b, b0, db], axis=1)
    left *= first.spec.pairs[module].scale
    return left, np.concatenate([a0, sum_a, da], axis=0)


def _place(u: Update, module: str, b: Array, a: Array, rows: Array, columns: Array) -> Term:
    return Term(u.rows(module, b, len(rows)) * rows[:, None], u.columns(module, a, len(columns)) * columns)


def factor_mean(updates: Sequence[Update]) -> Tensors:
    """Factor space: element-wise mean of dA and dB over the devices that hold each slot, holder-normalised
    like the product. One pass."""
    updates = sorted(updates, key=lambda u: u.device)
    sums = Sums()
    for u, w in zip(updates, shares(updates), strict=True):
        sums.add(u, w, u.sent)
    return dict(sorted(sums.mean().items()))


def merge(old: LowRank, change: Operator, rank: int) -> LowRank:
    """The best rank-`rank` pair for B·A + change, balanced (U√S, √SVᵀ), padded with zeros to `rank`, fp64.

    Full SVD where the matrix is small; QR of the stack where that is thin; else two passes of subspace
    iteration started at the old row space and the mean row change, which hold nearly all of the result.
    """
    terms = [Term(old.B.astype(np.float64), old.A.astype(np.float64)), *change.terms()]
    whole = Operator(change.out, change.in_, lambda: terms)
    if change.out * change.in_ <= DENSE:
        u, s, vt = np.linalg.svd(whole.dense(), full_matrices=False)
    elif sum(t.A.shape[0] for t in terms) <= min(change.out, change.in_) // 4:
        u, s, vt = by_qr(whole.stacked())
    else:
        u, s, vt = _by_subspace(whole, rank)
    return balanced(u, s, vt, rank)


def balanced(u: Array, s: Array, vt: Array, rank: int) -> LowRank:
    """(U√S, √SVᵀ) cut or padded to `rank`."""
    k = min(rank, len(s))
    root = np.sqrt(np.maximum(s[:k], 0.0))
    b, a = np.zeros((u.shape[0], rank)), np.zeros((rank, vt.shape[1]))
    b[:, :k], a[:k] = u[:, :k] * root, root[:, None] * vt[:k]
    return LowRank(b, a)


def by_qr(stack: LowRank) -> tuple[Array, Array, Array]:
    """Thin SVD of B·A from the QR of both factors."""
    qb, rb = np.linalg.qr(stack.B)
    qa, ra = np.linalg.qr(stack.A.T)
    u, s, vt = np.linalg.svd(rb @ ra.T)
    return qb @ u, s, vt @ qa.T


def _by_subspace(whole: Operator, rank: int) -> tuple[Array, Array, Array]:
    """Two passes of block power iteration, started at the old row space and a seeded sketch of all the
    others."""
    terms = whole.terms()
    width = min(2 * rank + 16, whole.out, whole.in_)
    own = min(rank, width)
    rng = np.random.default_rng(0)
    sketch = sum(
        (rng.standard_normal((width - own, len(t.A))) * np.linalg.norm(t.B, axis=0)) @ t.A for t in terms
    )
    q, _ = np.linalg.qr(np.concatenate([terms[0].A[:own], sketch]).T)
    for _ in range(2):
        left, _ = np.linalg.qr(whole.right(q))
        q, _ = np.linalg.qr(whole.left(left))
    u, s, vt = np.linalg.svd(whole.right(q), full_matrices=False)
    return u, s, vt @ q.T
