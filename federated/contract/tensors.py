"""Arithmetic on named arrays. Pure functions; nothing here knows what a device is."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
Tensors = dict[str, Array]


def lift(f: Callable[..., Array], *xs: Mapping[str, Array]) -> Tensors:
    """Apply `f` name by name. All mappings must carry the same names."""
    first = xs[0]
    for other in xs[1:]:
        if other.keys() != first.keys():
            raise KeyError(f"names differ: {sorted(first.keys() ^ other.keys())}")
    return {k: f(*(x[k] for x in xs)) for k in first}


def add(a: Mapping[str, Array], b: Mapping[str, Array]) -> Tensors:
    """`a + b`, name by name."""
    return lift(np.add, a, b)


def sub(a: Mapping[str, Array], b: Mapping[str, Array]) -> Tensors:
    """`a - b`, name by name."""
    return lift(np.subtract, a, b)


def scale(a: Mapping[str, Array], s: float) -> Tensors:
    """`s * a` in the dtype of each array."""
    return {k: (t * s).astype(t.dtype, copy=False) for k, t in a.items()}


def apply(base: Mapping[str, Array], delta: Mapping[str, Array]) -> Tensors:
    """`base` moved by `delta`, which may name only some of its tensors."""
    return {**base, **{k: base[k] + d for k, d in delta.items()}}


def fill(state: Mapping[str, Array] | None, like: Mapping[str, Array]) -> Tensors:
    """`state` restricted to the names in `like`; zeros where it has none. Names may differ between rounds."""
    have = state or {}
    return {k: have[k] if k in have else np.zeros_like(t) for k, t in like.items()}


def norm(a: Mapping[str, Array]) -> float:
    """Euclidean norm of everything in `a`, summed in fp64."""
    return float(np.sqrt(sum(float(np.vdot(t.astype(np.float64), t)) for t in a.values())))


def clip(a: Mapping[str, Array], bound: float) -> Tensors:
    """`a`, scaled down so that its norm is at most `bound`."""
    return scale(a, min(1.0, bound / (norm(a) + 1e-12)))


def mean(items: Iterable[Mapping[str, Array]], weights: Sequence[float]) -> Tensors:
    """Weighted mean over the items that hold each name; accumulated in fp64, in the order given."""
    total: dict[str, float] = {}
    sums: Tensors = {}
    kinds: dict[str, Any] = {}
    for item, weight in zip(items, weights, strict=True):
        for k, t in item.items():
            sums[k] = sums[k] + weight * t if k in sums else weight * t.astype(np.float64)
            total[k] = total.get(k, 0.0) + weight
            kinds[k] = t.dtype
    return {k: (t / total[k]).astype(kinds[k]) for k, t in sums.items() if total[k] > 0}


def floats(a: Mapping[str, Array]) -> Tensors:
    """The floating-point tensors of `a`: what a codec may still quantise."""
    return {k: t for k, t in a.items() if np.issubdtype(t.dtype, np.floating)}


def stochastic_round(t: Array, rng: np.random.Generator) -> Array:
    """Round up with the probability of the fraction: unbiased."""
    low = np.floor(t)
    return low + (rng.random(t.shape, dtype=np.float32) < t - low)
