"""The default aggregate in product space, in one pass over the updates and a second over their cross terms.

With G = Σ_k w_k D⁻¹ M_k∘(B₁A₁ - B₀A₀) as in `aggregate.py`, devices of one class share (B₀, A₀), so G = (Σ
w dB)·A₀ + B₀·(Σ w dA) + Σ w dB·dA. The first pass sums w dB and w dA and sketches the cross term: Y = (Σ w
dB·dA)·Ω. The column spaces of the two sums are known exactly then, so Q = orth[B, Σ w dB, B₀, Y] misses
nothing but a part of the cross term, which is of second order; the second pass gives Gᵀ·Q, and its SVD the
new factors. Where the missed part is not small, two more passes of subspace iteration are made. Updates
are read in blocks in device order: memory does not grow with the number of devices, and no bit depends on
the order of arrival. Small matrices are summed densely, short stacks exactly.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import numpy as np

from rankfleet.federated.contract.tensors import Array, Tensors
from rankfleet.federated.contract.update import LowRank, Update

from .stacked import DENSE, FLOOR, Term, balanced, by_qr, normaliser

T = TypeVar("T")
BLOCK, BLOCK_BYTES = 16, 11 << 20
"""Updates that are summed at once, and how much they may take; the next block is decoded meanwhile."""
RANDOM = 16
"""Random directions of the sketch."""
MISSED = 4e-3
"""Share of the change's energy that may lie outside Q before more passes are made."""


class ModuleClass:
    """What devices that share a view of one module sum up to, in their compact coordinates."""

    def __init__(self, module: str, first: Update, mode: str, omega: Array) -> None:
        self.module, self.first, self.mode = module, first, mode
        self.a0, self.b0 = (first.view[f"{module}.{s}"] for s in "AB")
        self.rank = self.a0.shape[0]
        self.weight = 0.0
        self.sum_b, self.sum_a = np.zeros(self.b0.shape), np.zeros(self.a0.shape)
        self.parts: list[tuple[Array, Array]] = []
        kept = first.masks.get(f"{module}.in")
        self.omega = omega if kept is None else omega[kept]
        out, in_ = len(self.b0), self.a0.shape[1]
        self.cross = (
            np.zeros((out, in_ if mode == "dense" else self.omega.shape[1]))
            if mode in ("dense", "sketch")
            else np.zeros((0, 0))
        )
        self.back = np.zeros((0, 0))

    def stack(self, members: Sequence[Update]) -> tuple[Array, Array, Array]:
        """[dB₁ dB₂ …], [dA₁; dA₂; …] and the weight of every column."""
        deltas = [u.pair(self.module) for u in members]
        db, da = (
            np.concatenate([b for b, _ in deltas], axis=1),
            np.concatenate([a for _, a in deltas], axis=0),
        )
        weights = np.repeat(np.array([u.weight * u.scaling for u in members]), self.rank).astype(db.dtype)
        return db, da, weights

    def add(self, members: Sequence[Update]) -> None:
        """First pass, one block."""
        self.weight += sum(u.weight for u in members)
        db, da, weights = self.stack(members)
        each = weights[:, None] * np.tile(np.eye(self.rank, dtype=db.dtype), (len(members), 1))
        self.sum_b += db @ each
        self.sum_a += each.T @ da
        if self.mode == "stack":
            self.parts.append((db * weights, da))
        elif self.mode == "dense":
            self.cross += (db * weights) @ da
        else:
            self.cross += db @ ((da @ self.omega.astype(da.dtype)) * weights[:, None])

    def right(self, members: Sequence[Update], x: Array) -> None:
        """Further passes: cross += (Σ w dB·dA)·x."""
        db, da, weights = self.stack(members)
        self.cross += db @ ((da @ x.astype(da.dtype)) * weights[:, None])

    def left(self, members: Sequence[Update], q: Array) -> None:
        """Second pass: back += (Σ w dB·dA)ᵀ·q."""
        db, da, weights = self.stack(members)
        self.back += da.T @ ((db.T @ q.astype(db.dtype)) * weights[:, None])


class Module:
    """One adapted matrix: its classes, and the way from their sums to new factors."""

    def __init__(self, name: str, out: int, in_: int, old: LowRank, devices: int, classes_rank: int) -> None:
        self.name, self.out, self.in_ = name, out, in_
        self.old = LowRank(old.B.astype(np.float64), old.A.astype(np.float64))
        self.rank = old.A.shape[0]
        columns = self.rank + (devices + 2) * classes_rank
        self.mode = "dense" if out * in_ <= DENSE else "stack" if columns <= min(out, in_) // 4 else "sketch"
        self.classes: dict[str, ModuleClass] = {}
        rng = np.random.default_rng(0)
        start = (
            np.concatenate([self.old.A, rng.standard_normal((RANDOM, in_))])
            if self.mode == "sketch"
            else np.zeros((0, in_))
        )
        self.omega = np.linalg.qr(start.T)[0] if self.mode == "sketch" else start.T
        self.q = np.zeros((0, 0))

    def settle(self, total: float) -> None:
        """After the first pass: the normaliser of every channel, and the exactly known terms."""
        self.total = total
        masked_in = any(f"{self.name}.in" in c.first.masks for c in self.classes.values())
        self.rows = np.ones((self.out, 1)) if masked_in else 1 / self._held("out", self.out)[:, None]
        self.columns = 1 / self._held("in", self.in_) if masked_in else np.ones(self.in_)
        self.terms = [Term(self.old.B, self.old.A)]
        for c in self.classes.values():
            parts = [(c.sum_b, c.a0), (c.b0, c.sum_a), *(c.parts if self.mode == "stack" else [])]
            self.terms += [Term(self._out(c, b) / total, self._in(c, a)) for b, a in parts]

    def _held(self, side: str, size: int) -> Array:
        return normaliser(
            (
                (c.first.masks.get(f"{self.name}.{side}"), c.weight / self.total)
                for c in self.classes.values()
            ),
            size,
        )

    def _out(self, c: ModuleClass, b: Array) -> Array:
        return c.first.rows(self.name, b.astype(np.float64), self.out) * self.rows

    def _in(self, c: ModuleClass, a: Array) -> Array:
        return c.first.columns(self.name, a.astype(np.float64), self.in_) * self.columns

    def known(self) -> LowRank:
        """All terms but the cross term, as one pair."""
        return LowRank(
            np.concatenate([t.B for t in self.terms], axis=1),
            np.concatenate([t.A for t in self.terms], axis=0),
        )

    def dense(self) -> Array:
        """The new matrix itself."""
        known = self.known()
        whole: Array = known.B @ known.A
        for c in self.classes.values():
            whole += self._in(c, self._out(c, c.cross)) / self.total
        return whole

    def exact(self) -> LowRank:
        """New factors where everything is at hand."""
        if self.mode == "dense":
            return balanced(*np.linalg.svd(self.dense(), full_matrices=False), self.rank)
        return balanced(*by_qr(self.known()), self.rank)

    def open(self) -> None:
        """Q for the second pass: the known column space, as far as it matters, and the sketch of the cross
        term."""
        known = self.known()
        self.spread = known
        left = known.B
        if left.shape[1] > 4 * self.rank + 8:
            left = by_qr(known)[0][:, : 2 * self.rank + 8]
        self.q = np.linalg.qr(np.concatenate([left, self._crossed()], axis=1))[0]
        # Orthonormal random directions see every part of the cross term alike, which gives its energy.
        seen = self._crossed()[:, self.rank :]
        self.energy = float(np.square(seen).sum()) * self.in_ / max(1, seen.shape[1])
        self._start_left()

    def _crossed(self) -> Array:
        """(Σ w dB·dA)·Ω over all classes."""
        return np.asarray(sum(self._out(c, c.cross) for c in self.classes.values()) / self.total)

    def _start_left(self) -> None:
        for c in self.classes.values():
            c.back = np.zeros((c.a0.shape[1], self.q.shape[1]))

    def q_of(self, c: ModuleClass) -> Array:
        """Q in the compact rows of a class."""
        kept = c.first.masks.get(f"{self.name}.out")
        scaled = self.q * self.rows
        return scaled if kept is None else scaled[kept]

    def turned(self) -> Array:
        """Gᵀ·Q, (in, width), after the second pass."""
        crossed = sum(self._in(c, c.back.T) for c in self.classes.values()) / self.total
        self.missed = max(0.0, self.energy - float(np.square(crossed).sum()))
        whole: Array = self.spread.A.T @ (self.spread.B.T @ self.q) + np.asarray(crossed).T
        return whole

    def again(self, z: Array) -> None:
        """Start another right pass from the row space that was found."""
        self.omega = np.linalg.qr(z)[0]
        for c in self.classes.values():
            kept = c.first.masks.get(f"{self.name}.in")
            scaled = self.omega * self.columns[:, None]
            c.omega = scaled if kept is None else scaled[kept]
            c.cross = np.zeros((len(c.b0), self.omega.shape[1]))

    def turn(self) -> None:
        """Q from that pass."""
        self.q = np.linalg.qr(self.spread.B @ (self.spread.A @ self.omega) + self._crossed())[0]
        self._start_left()

    def factors(self, z: Array) -> LowRank:
        """New factors from Q and Gᵀ·Q."""
        u, s, vt = np.linalg.svd(z.T, full_matrices=False)
        return balanced(self.q @ u, s, vt, self.rank)


def product(
    updates: Iterable[Update], old: Mapping[str, LowRank], devices: int
) -> tuple[dict[str, LowRank], Tensors, list[Update]]:
    """New factors of every module that was moved, the mean change of dense tensors, and the updates that
    went in.

    `updates` come in device order and may be decoded on demand; `devices` is how many there may be.
    """
    modules: dict[str, Module] = {}
    used: list[Update] = []
    dense: dict[str, list[Array | float]] = {}
    for block in ahead(_blocks(updates)):
        used += block
        for u in block:
            for k, t in ((k, t) for k, t in u.sent.items() if k in u.spec.dense):
                entry = dense.setdefault(k, [np.zeros(t.shape), 0.0])
                entry[0], entry[1] = (
                    entry[0] + u.weight * u.scaling * t.astype(np.float64),
                    entry[1] + u.weight,
                )
        for name, members in _by_module(block, old, devices, modules):
            modules[name].classes[members[0].origin or members[0].device].add(members)
    if not used:
        return {}, {}, []
    total = sum(u.weight for u in used)
    for m in modules.values():
        m.settle(total)
    found = {n: m.exact() for n, m in modules.items() if m.mode != "sketch"}
    found |= _sketched({n: m for n, m in modules.items() if m.mode == "sketch"}, used)
    means = {
        k: (np.asarray(s) / total / max(float(w) / total, FLOOR)).astype(np.float32)
        for k, (s, w) in dense.items()
    }
    return found, means, used


def _blocks(updates: Iterable[Update]) -> Iterator[list[Update]]:
    block: list[Update] = []
    size = 0
    for u in updates:
        size = size or max(1, min(BLOCK, BLOCK_BYTES // (1 + u.spec.bytes())))
        block.append(u)
        if len(block) == size:
            yield block
            block = []
    if block:
        yield block


def _loaded(blocks: Iterator[list[Update]]) -> Iterator[list[Update]]:
    """Blocks whose updates are decoded already."""
    for block in blocks:
        for u in block:
            len(u.sent)
        yield block


def ahead(items: Iterator[T]) -> Iterator[T]:
    """The same items; the next one is made in another thread while one is used."""
    with ThreadPoolExecutor(1, "ahead") as pool:
        coming = pool.submit(next, items, None)
        while (item := coming.result()) is not None:
            coming = pool.submit(next, items, None)
            yield item


def _by_module(
    block: Sequence[Update], old: Mapping[str, LowRank], devices: int, modules: dict[str, Module]
) -> Iterator[tuple[str, list[Update]]]:
    """(module, members of one class that hold it) over a block; new modules and classes are made."""
    groups: dict[str, list[Update]] = {}
    for u in block:
        groups.setdefault(u.origin or u.device, []).append(u)
    for origin, members in groups.items():
        for name in sorted({m for u in members for m in u.modules()}):
            holders = [u for u in members if u.holds(name)]
            pair = holders[0].spec.pairs[name]
            if name not in modules:
                modules[name] = Module(name, pair.out, pair.in_, old[name], devices, pair.rank)
            module = modules[name]
            if origin not in module.classes:
                module.classes[origin] = ModuleClass(name, holders[0], module.mode, module.omega)
            yield name, holders


def _pass(modules: Mapping[str, Module], used: Sequence[Update], way: str) -> None:
    """Once more over all updates, for the modules given."""
    factors = {
        (n, o): (m.q_of(c) if way == "left" else c.omega) for n, m in modules.items() for o,
        c in m.classes.items()
    }  # fmt: skip
    for block in ahead(_loaded(_blocks(used))):
        groups: dict[str, list[Update]] = {}
        for u in block:
            groups.setdefault(u.origin or u.device, []).append(u)
        for origin, members in groups.items():
            for name in sorted(n for n, o in factors if o == origin):
                holders = [u for u in members if u.holds(name)]
                if holders:
                    getattr(modules[name].classes[origin], way)(holders, factors[name, origin])


def _sketched(modules: dict[str, Module], used: Sequence[Update]) -> dict[str, LowRank]:
    """Second pass, and two more pairs of passes where the cross term is not small."""
    if not modules:
        return {}
    for m in modules.values():
        m.open()
    _pass(modules, used, "left")
    turned = {n: m.turned() for n, m in modules.items()}
    for _ in range(2):
        more = {n: m for n, m in modules.items() if m.missed > MISSED * float(np.square(turned[n]).sum())}
        for n, m in more.items():
            m.again(turned[n])
        if more:
            _pass(more, used, "right")
            for m in more.values():
                m.turn()
            _pass(more, used, "left")
            turned |= {n: m.turned() for n, m in more.items()}
    return {n: m.factors(turned[n]) for n, m in modules.items()}
