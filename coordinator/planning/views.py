"""What devices receive: the global adapter, cut to a rank and turned so that old state keeps its meaning.

In product space a view of rank r is the balanced truncation of the global pair, rotated onto the view of
the same rank that was last sent (orthogonal Procrustes): the split of B·A is free up to a rotation, and
with this one error feedback and moments in factor coordinates carry over. Slots without energy would never
move, since both their factors are zero; they get a seeded orthonormal row of A and a zero column of B. In
factor space a view is the first r slots, as they are.
"""

import numpy as np

from rankfleet.federated.contract.stack import seed_of
from rankfleet.federated.contract.tensors import Array, Tensors
from rankfleet.federated.contract.update import LowRank

EMPTY = 1e-6
"""Slots below this share of the largest singular value count as empty."""


def view(pair: LowRank, rank: int, previous: LowRank | None, seed: int, module: str, half: bool) -> LowRank:
    """(B₀, A₀) of rank `rank`, fp32 values (exactly fp16 ones with `half`, since that is how they travel)."""
    b, a = pair.B[:, :rank].astype(np.float64), pair.A[:rank].astype(np.float64)
    b, a = fill_empty(b, a, seed, module)
    if previous is not None and previous.B.shape == b.shape and previous.A.shape == a.shape:
        u, _, vt = np.linalg.svd(b.T @ previous.B + a @ previous.A.T)
        turn = u @ vt
        b, a = b @ turn, turn.T @ a
    kind = np.float16 if half else np.float32
    return LowRank(b.astype(kind).astype(np.float32), a.astype(kind).astype(np.float32))


def fill_empty(b: Array, a: Array, seed: int, module: str) -> tuple[Array, Array]:
    """Give every empty slot a unit row of A, orthogonal to the others, and a zero column of B."""
    strength = np.linalg.norm(b, axis=0) * np.linalg.norm(a, axis=1)
    top = strength.max(initial=0.0)
    empty = np.flatnonzero(strength <= EMPTY * top) if top > 0 else np.arange(len(strength))
    if not len(empty):
        return b, a
    b, a = b.copy(), a.copy()
    rng = np.random.default_rng(seed_of(seed, module, "rows"))
    fresh = rng.standard_normal((a.shape[0], a.shape[1]))[empty]
    full = np.setdiff1d(np.arange(len(strength)), empty)
    if len(full):
        q, _ = np.linalg.qr(a[full].T)
        fresh = fresh - (fresh @ q) @ q.T
    q, r = np.linalg.qr(fresh.T)
    a[empty] = (q * np.sign(np.diag(r))).T if q.shape[1] == len(empty) else fresh
    b[:, empty] = 0.0
    return b, a


def fresh_factors(out: int, in_: int, rank: int, seed: int, module: str) -> LowRank:
    """The start in factor space: seeded orthonormal rows of A, zero B; rank r is the first r rows of a
    larger one."""
    b, a = fill_empty(np.zeros((out, rank)), np.zeros((rank, in_)), seed, module)
    return LowRank(b.astype(np.float32), a.astype(np.float32))


def cut(pair: LowRank, kept_out: Array | None, kept_in: Array | None) -> Tensors:
    """A view restricted to the rows and columns that a device keeps: `A` and `B`."""
    return {
        "A": pair.A if kept_in is None else pair.A[:, kept_in],
        "B": pair.B if kept_out is None else pair.B[kept_out],
    }


def grow(pair: LowRank, rank: int) -> LowRank:
    """The same product with more (empty) slots; never fewer."""
    extra = rank - pair.A.shape[0]
    if extra <= 0:
        return pair
    return LowRank(np.pad(pair.B, ((0, 0), (0, extra))), np.pad(pair.A, ((0, extra), (0, 0))))
