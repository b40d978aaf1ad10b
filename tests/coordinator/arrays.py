"""Random updates with any mix of rank, depth and mask, and the dense reference that they are compared
with."""

import numpy as np

from rankfleet.coordinator.aggregate.stacked import FLOOR
from rankfleet.federated.contract.spec import Dense, Pair, Spec
from rankfleet.federated.contract.tensors import Array
from rankfleet.federated.contract.update import Update

OUT, IN, SCALE = 40, 24, 2.0


def update(
    device: str,
    rng: np.random.Generator,
    rank: int,
    *,
    modules: tuple[str, ...] = ("up", "down"),
    keep: float = 1.0,
    weight: float = 1.0,
    size: tuple[int, int] = (OUT, IN),
    view: dict[str, Array] | None = None,
    dtype: type = np.float32,
) -> Update:
    """`up` (out, in) loses rows, `down` (in, out) loses columns, as in a feed-forward block."""
    out, in_ = size
    kept = np.sort(rng.choice(out, max(1, round(keep * out)), replace=False)).astype(np.int32)
    pairs, views, delta, masks = {}, {}, {}, {}
    for name in modules:
        rows, columns = (out, in_) if name.startswith("up") else (in_, out)
        masked = keep < 1
        n = len(kept) if masked and name.startswith("up") else rows
        m = len(kept) if masked and not name.startswith("up") else columns
        pairs[name] = Pair(0, rows, columns, rank, SCALE, n, m, "v")
        if masked:
            masks[f"{name}.out" if name.startswith("up") else f"{name}.in"] = kept
        views |= {
            f"{name}.A": rng.standard_normal((rank, m)).astype(dtype),
            f"{name}.B": rng.standard_normal((n, rank)).astype(dtype),
        }
        delta |= {
            f"{name}.A": rng.standard_normal((rank, m)).astype(dtype),
            f"{name}.B": rng.standard_normal((n, rank)).astype(dtype),
        }
    views |= view or {}
    delta["head"] = rng.standard_normal((3, 5)).astype(dtype)
    return Update(device, weight, delta, Spec(pairs, {"head": Dense((3, 5))}), views, masks, origin=device)


def moved(u: Update, module: str) -> Array:
    """s·(B₁A₁ - B₀A₀) in canonical coordinates, by the definition, fp64."""
    pair = u.spec.pairs[module]
    a0, b0 = u.view[f"{module}.A"].astype(float), u.view[f"{module}.B"].astype(float)
    a1, b1 = a0 + u.delta[f"{module}.A"], b0 + u.delta[f"{module}.B"]
    rows = u.masks.get(f"{module}.out", np.arange(pair.out))
    columns = u.masks.get(f"{module}.in", np.arange(pair.in_))
    full = np.zeros((pair.out, pair.in_))
    full[np.ix_(rows, columns)] = pair.scale * (b1 @ a1 - b0 @ a0)
    return full


def reference(updates: list[Update], module: str) -> Array:
    """Σ w D⁻¹ M∘s(B₁A₁ - B₀A₀) with D_j = max(Σ w [j kept], δ₀), entry by entry."""
    total = sum(u.weight for u in updates)
    holders = [u for u in updates if u.holds(module)]
    pair = holders[0].spec.pairs[module]
    mass = np.zeros((pair.out, pair.in_))
    result = np.zeros((pair.out, pair.in_))
    for u in holders:
        rows = np.isin(np.arange(pair.out), u.masks.get(f"{module}.out", np.arange(pair.out)))
        columns = np.isin(np.arange(pair.in_), u.masks.get(f"{module}.in", np.arange(pair.in_)))
        mass += u.weight / total * np.outer(rows, columns)
        result += u.weight / total * u.scaling * moved(u, module)
    return result / np.maximum(mass, FLOOR)


def relative(a: Array, b: Array) -> float:
    """‖a - b‖ / ‖b‖."""
    return float(np.linalg.norm(a - b) / (np.linalg.norm(b) + 1e-30))
