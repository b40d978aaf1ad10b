"""What the tensors of an adapter mean: shapes, layers, ranks and the channels that a device keeps.

Canonical coordinates are those of the unpruned base. A device works on compact arrays: rows of `B` and
columns of `A` that belong to pruned channels are absent. Index lists (`Masks`) connect the two.
"""

import math
from functools import cached_property

import msgspec


class Pair(msgspec.Struct, frozen=True, rename={"in_": "in"}):
    """A low-rank pair on one linear module: `B` (kept_out, rank) and `A` (rank, kept_in), ΔW = scale·B·A."""

    layer: int
    out: int
    in_: int
    rank: int
    scale: float
    kept_out: int
    kept_in: int
    view: str
    """Lineage of the factor coordinates; state made under another lineage is dropped."""
    trained: bool = True
    """False for a pair below the device's boundary: applied, frozen, never sent."""


class Dense(msgspec.Struct, frozen=True):
    """A plain tensor, such as a classifier head."""

    shape: tuple[int, ...]
    trained: bool = True


class Spec(msgspec.Struct, frozen=True, dict=True):
    """Everything a device's adapter consists of, by module or tensor name."""

    pairs: dict[str, Pair]
    dense: dict[str, Dense]

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Tensor name → compact shape, of the trained tensors, in sorted order."""
        return self._shapes

    @cached_property
    def _shapes(self) -> dict[str, tuple[int, ...]]:
        found: dict[str, tuple[int, ...]] = {k: d.shape for k, d in self.dense.items() if d.trained}
        for module, pair in self.pairs.items():
            if pair.trained:
                found[f"{module}.A"] = (pair.rank, pair.kept_in)
                found[f"{module}.B"] = (pair.kept_out, pair.rank)
        return dict(sorted(found.items()))

    def bytes(self) -> int:
        """Bytes of the trained tensors as fp32."""
        return 4 * sum(math.prod(s) for s in self.shapes().values())


def module_of(name: str) -> str:
    """`layer.3.query.A` → `layer.3.query`; a dense tensor's name stays."""
    return name[:-2] if name.endswith((".A", ".B")) else name


def coordinates(spec: Spec) -> dict[str, str]:
    """Tensor name → id of the coordinates it lives in. Equal ids: state of earlier rounds still means the
    same."""
    ids = {k: f"dense:{d.shape}" for k, d in spec.dense.items()}
    for module, p in spec.pairs.items():
        for side in "AB":
            ids[f"{module}.{side}"] = f"{p.view}:{p.rank}:{p.kept_out}:{p.kept_in}"
    return ids
