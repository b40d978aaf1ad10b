"""The streamed aggregate against the dense definition, in every one of its three ways of summing."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rankfleet.coordinator.aggregate import streaming
from rankfleet.coordinator.aggregate.kept import Decoded, Keeper
from rankfleet.federated.contract.tensors import Array
from rankfleet.federated.contract.update import LowRank, Update

from .arrays import SCALE, reference, relative, update

device = st.tuples(
    st.sampled_from([1, 2, 4, 8]),
    st.sampled_from([1.0, 0.7, 0.3]),
    st.sampled_from([("up", "down"), ("up",), ("down",)]),
    st.floats(0.1, 10),
)


def start(updates: list[Update], rng: np.random.Generator, rank: int) -> dict[str, LowRank]:
    """A global adapter of a rank."""
    pairs = {m: p for u in updates for m, p in u.spec.pairs.items()}
    return {
        m: LowRank(rng.standard_normal((p.out, rank)) / 9, rng.standard_normal((rank, p.in_)) / 9)
        for m, p in pairs.items()
    }


def whole(old: LowRank, updates: list[Update], module: str) -> Array:
    """B·A plus the change by its definition; versions hold B·A without s."""
    return np.asarray(old.B @ old.A + reference(updates, module) / SCALE)


@pytest.mark.parametrize("dense", [1 << 20, 0])
@given(st.lists(device, min_size=1, max_size=6), st.integers(0, 2**31))
@settings(max_examples=40, deadline=None)
def test_equals_the_dense_reference_for_any_mix(
    dense: int, devices: list[tuple[int, float, tuple[str, ...], float]], seed: int
) -> None:
    rng = np.random.default_rng(seed)
    updates = [update(f"d{i}", rng, r, keep=k, modules=m, weight=w) for i, (r, k, m, w) in enumerate(devices)]
    old = start(updates, rng, 24)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(streaming, "DENSE", dense)
        pairs, means, used = streaming.product(updates, old, len(updates))
    assert used == updates
    for module in {m for u in updates for m in u.modules()}:
        assert relative(pairs[module].B @ pairs[module].A, whole(old[module], updates, module)) < 1e-5
    total = sum(u.weight for u in updates)
    assert relative(means["head"], sum(u.weight / total * u.delta["head"] for u in updates)) < 1e-5


@pytest.mark.parametrize("count", [3, 40])
@pytest.mark.parametrize("strength", [0.01, 0.03, 0.06, 0.1, 0.2, 1.0])
@pytest.mark.parametrize("keep", [1.0, 0.5])
def test_truncation_is_the_best_one(count: int, strength: float, keep: float) -> None:
    """Strong deltas make the cross term large; then more passes are made."""
    rng = np.random.default_rng(1)
    size = (320, 400)
    kinds = [
        update(f"v{i}", rng, r, modules=("up",), keep=keep if i else 1.0, size=size)
        for i, r in enumerate((4, 8))
    ]
    updates = []
    for i in range(count):
        like = kinds[i % 2]
        delta = {
            k: (strength * rng.standard_normal(t.shape)).astype(np.float32) for k, t in like.delta.items()
        }
        updates.append(
            Update(f"d{i:03}", 1.0 + i % 3, delta, like.spec, like.view, like.masks, origin=like.device)
        )
    old = start(updates, rng, 8)
    pairs, _, _ = streaming.product(updates, old, count)
    goal = whole(old["up"], updates, "up")
    u, s, vt = np.linalg.svd(goal, full_matrices=False)
    best = (u[:, :8] * s[:8]) @ vt[:8]
    missed, least = np.linalg.norm(goal - pairs["up"].B @ pairs["up"].A), np.linalg.norm(goal - best)
    assert missed <= least + 1e-3 * np.linalg.norm(best)


def test_what_is_decoded_again_gives_the_same_bits() -> None:
    rng = np.random.default_rng(2)
    like = update("v", rng, 4, modules=("up",), size=(300, 300))
    deltas = [
        {k: rng.standard_normal(t.shape).astype(np.float32) for k, t in like.delta.items()} for _ in range(30)
    ]
    old = start([like], rng, 8)
    results = []
    for pinned, recent in ((100.0, 100.0), (0.0, 0.02), (0.03, 0.02)):
        keeper, made = Keeper(pinned, recent), [0]

        def decode(delta: Any, made: list[int] = made) -> Any:
            made[0] += 1
            return dict(delta)

        updates = [
            Update(f"d{i:02}", 1.0, Decoded(keeper, lambda d=d: decode(d)), like.spec, like.view, origin="v")
            for i, d in enumerate(deltas)
        ]
        results.append((streaming.product(updates, old, 30)[0]["up"], made[0]))
        assert sum(t.nbytes for held in keeper.recent.values() for t in held.values()) <= recent * 1e6
    assert results[0][1] == 30
    assert results[1][1] > 30
    for (b, a), _ in results[1:]:
        assert np.array_equal(results[0][0].B, b)
        assert np.array_equal(results[0][0].A, a)
