"""One device's contribution, lifted to canonical coordinates, as `admit` and `reduce` see it."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np

from .spec import Spec, module_of
from .tensors import Array, Tensors, norm

Masks = dict[str, Array]
"""`<module>.out` and `<module>.in` → indices of the kept rows and columns, in canonical coordinates."""


class LowRank(NamedTuple):
    """`B @ A`: B (out, k), A (k, in)."""

    B: Array
    A: Array


class Scaled(Mapping[str, Array]):
    """Arrays times a number, multiplied when they are looked at; integers stay as they are, a mask is no
    length."""

    def __init__(self, arrays: Mapping[str, Array], by: float) -> None:
        self._arrays, self._by = arrays, by

    def __getitem__(self, name: str) -> Array:
        array = self._arrays[name]
        return (array * array.dtype.type(self._by)) if array.dtype.kind == "f" else array

    def __iter__(self) -> Iterator[str]:
        return iter(self._arrays)

    def __len__(self) -> int:
        return len(self._arrays)


@dataclass(frozen=True)
class Update:
    """What one device sends up: factor deltas against the view (B₀, A₀) that it was given.

    `delta` and `view` are compact; `factors` gives a module's s·(B₁A₁ - B₀A₀) in canonical coordinates.
    Whatever is read here is scaled by what `scale` was called with; `scale` itself copies no array.
    """

    device: str
    weight: float
    sent: Mapping[str, Array]
    """Compact deltas by name as they were sent, unscaled: for the engine. Those of stored updates are
    decoded when they are looked at."""
    spec: Spec
    view: Tensors
    masks: Masks = field(default_factory=dict)
    extra: dict[str, Tensors] = field(default_factory=dict)
    report: Mapping[str, Any] = field(default_factory=dict)
    age: int = 0
    scaling: float = 1.0
    """What `scale` has come to: for the engine, which applies it together with the weight."""
    space: str = "product"
    origin: str = ""
    """Digest of the view: updates of one origin share (B₀, A₀)."""

    def holds(self, module: str) -> bool:
        """Did this device send anything for that pair?"""
        return module in self._modules

    @property
    def delta(self) -> Mapping[str, Array]:
        """Compact deltas by name, scaled."""
        return self.sent if self.scaling == 1.0 else Scaled(self.sent, self.scaling)

    def deltas(self, module: str) -> tuple[Array, Array]:
        """(dB, dA) of one pair, scaled; zeros where a factor did not travel."""
        db, da = self.pair(module)
        return (
            (db, da)
            if self.scaling == 1.0
            else (db * np.float32(self.scaling), da * np.float32(self.scaling))
        )

    def pair(self, module: str) -> tuple[Array, Array]:
        """(dB, dA) as they were sent, unscaled: for the engine."""
        a0, b0 = self.view[f"{module}.A"], self.view[f"{module}.B"]
        da, db = self.sent.get(f"{module}.A"), self.sent.get(f"{module}.B")
        return (np.zeros_like(b0) if db is None else db), (np.zeros_like(a0) if da is None else da)

    def factors(self, module: str) -> LowRank:
        """s·(B₁A₁ - B₀A₀) = s·(dB·A₀ + (B₀+dB)·dA) as one canonical pair of rank 2r; the product is
        scaled, not each factor."""
        pair = self.spec.pairs[module]
        db, da = self.pair(module)
        a0, b0 = self.view[f"{module}.A"], self.view[f"{module}.B"]
        left = np.concatenate([db, b0 + db], axis=1) * (pair.scale * self.scaling)
        right = np.concatenate([a0, da], axis=0)
        return LowRank(self.rows(module, left, pair.out), self.columns(module, right, pair.in_))

    def rows(self, module: str, compact: Array, size: int) -> Array:
        """Scatter kept rows to their canonical places."""
        kept = self.masks.get(f"{module}.out")
        if kept is None:
            return compact
        full = np.zeros((size, compact.shape[1]), compact.dtype)
        full[kept] = compact
        return full

    def columns(self, module: str, compact: Array, size: int) -> Array:
        """Scatter kept columns to their canonical places."""
        kept = self.masks.get(f"{module}.in")
        if kept is None:
            return compact
        full = np.zeros((compact.shape[0], size), compact.dtype)
        full[:, kept] = compact
        return full

    def modules(self) -> list[str]:
        """Pairs that this update moves, sorted."""
        return sorted(self._modules)

    def dense(self) -> Tensors:
        """Deltas of tensors outside the pairs (heads), scaled."""
        return {k: t for k, t in self.delta.items() if k in self.spec.dense}

    @cached_property
    def _modules(self) -> frozenset[str]:
        return frozenset(module_of(k) for k in self.sent if module_of(k) in self.spec.pairs)

    @cached_property
    def _norm(self) -> float:
        if self.space == "factors":
            return norm(self.sent)
        square = norm({k: t for k, t in self.sent.items() if k in self.spec.dense}) ** 2
        for module in self.modules():
            db, da = self.pair(module)
            a0, b1 = self.view[f"{module}.A"], self.view[f"{module}.B"] + db
            # ‖dB·A₀ + B₁·dA‖² from r×r products alone.
            left = np.concatenate([db, b1], axis=1)
            right = np.concatenate([a0, da], axis=0)
            gram = (left.T @ left) * (right @ right.T)
            square += self.spec.pairs[module].scale ** 2 * float(gram.sum(dtype=np.float64))
        return float(np.sqrt(max(square, 0.0)))

    def norm(self) -> float:
        """‖update‖: of all s·(B₁A₁ - B₀A₀) and heads in product space, of the raw deltas in factor space."""
        return self._norm * abs(self.scaling)

    def dot(self, other: "Update") -> float:
        """Inner product of two updates, from the factors."""
        by = self.scaling * other.scaling
        total = by * sum(
            float(np.vdot(t, other.sent[k]))
            for k, t in self.sent.items()
            if k in self.spec.dense and k in other.sent
        )
        for module in self.modules():
            if not other.holds(module):
                continue
            if self.space == "factors":
                for name in (f"{module}.A", f"{module}.B"):
                    if name in self.sent and name in other.sent:
                        total += by * float(np.vdot(self.sent[name], other.sent[name]))
                continue
            (b, a), (d, c) = self.factors(module), other.factors(module)
            total += float(np.sum((b.T @ d).astype(np.float64) * (a @ c.T)))
        return total

    def scale(self, by: float) -> "Update":
        """The same update, `by` times as large."""
        return replace(self, scaling=self.scaling * by)

    def extra_of(self, method: object) -> Tensors:
        """What `method` put into `ctx.up` on the device; empty if it had nothing to say."""
        return self.extra.get(type(method).__module__.rpartition(".")[2], {})
