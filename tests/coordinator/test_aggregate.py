"""Aggregation against the dense definition: docs/specification.md, with its acceptance tests."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rankfleet.coordinator.aggregate import combine
from rankfleet.coordinator.aggregate import stacked as aggregate
from rankfleet.coordinator.aggregate.stacked import FLOOR, Operator, Term, balanced, factor_mean, merge
from rankfleet.coordinator.planning.views import view
from rankfleet.coordinator.store.versions import Version
from rankfleet.federated.contract.server_side import ServerSide
from rankfleet.federated.contract.stack import Stack
from rankfleet.federated.contract.update import LowRank, Update

from .arrays import IN, OUT, SCALE, moved, reference, relative, update

device = st.tuples(
    st.sampled_from([1, 2, 4, 8]),
    st.sampled_from([1.0, 0.7, 0.3]),
    st.sampled_from([("up", "down"), ("up",), ("down",)]),
    st.floats(0.1, 10),
)


@given(st.lists(device, min_size=1, max_size=6), st.integers(0, 2**31))
@settings(max_examples=60, deadline=None)
def test_equals_the_dense_reference_for_any_mix(
    devices: list[tuple[int, float, tuple[str, ...], float]], seed: int
) -> None:
    rng = np.random.default_rng(seed)
    updates = [update(f"d{i}", rng, r, keep=k, modules=m, weight=w) for i, (r, k, m, w) in enumerate(devices)]
    change = aggregate.product(updates)
    for module in ("up", "down"):
        if any(u.holds(module) for u in updates):
            op = change[module]
            assert isinstance(op, Operator)
            assert relative(op.dense(), reference(updates, module)) < 1e-5
            pair = op.stacked()
            assert relative(pair.B @ pair.A, reference(updates, module)) < 1e-5


def test_fp64_equals_the_reference_to_1e12() -> None:
    rng = np.random.default_rng(0)
    updates = [
        update(f"d{i}", rng, r, keep=k, dtype=np.float64)
        for i, (r, k) in enumerate([(2, 1.0), (4, 0.5), (8, 0.7)])
    ]
    op = aggregate.product(updates)["up"]
    assert isinstance(op, Operator)
    assert relative(op.dense(), reference(updates, "up")) < 1e-12


def test_equal_devices_give_the_plain_mean() -> None:
    rng = np.random.default_rng(1)
    updates = [update(f"d{i}", rng, 4) for i in range(5)]
    op = aggregate.product(updates)["up"]
    assert isinstance(op, Operator)
    assert relative(op.dense(), sum(moved(u, "up") for u in updates) / 5) < 1e-6
    assert (
        relative(np.asarray(aggregate.product(updates)["head"]), sum(u.delta["head"] for u in updates) / 5)
        < 1e-6
    )


def test_the_weight_in_both_factors_would_be_found_wrong() -> None:
    rng = np.random.default_rng(2)
    updates = [update(f"d{i}", rng, 4) for i in range(4)]
    wrong = sum((0.25 * u.factors("up").B) @ (0.25 * u.factors("up").A) for u in updates)
    assert relative(wrong, reference(updates, "up")) > 0.5


def test_devices_of_one_view_share_their_sums() -> None:
    rng = np.random.default_rng(3)
    first = update("d0", rng, 4)
    others = [
        Update(f"d{i}", 1.0, update("x", rng, 4).delta, first.spec, first.view, origin="v") for i in range(6)
    ]
    op = aggregate.product(others)["up"]
    assert isinstance(op, Operator)
    assert [t.A.shape[0] for t in op.terms()] == [(2 + 6) * 4]
    assert relative(op.dense(), reference(others, "up")) < 1e-6


def test_rare_channels_are_floored() -> None:
    rng = np.random.default_rng(4)
    updates = [
        update("big", rng, 2, weight=0.95, modules=("down",)),
        update("small", rng, 2, weight=0.05, modules=("up",)),
    ]
    op = aggregate.product(updates)["up"]
    assert isinstance(op, Operator)
    assert relative(op.dense(), 0.05 / FLOOR * moved(updates[1], "up")) < 1e-6


def test_order_of_arrival_does_not_matter() -> None:
    rng = np.random.default_rng(5)
    updates = [
        update(f"d{i}", rng, r, keep=k) for i, (r, k) in enumerate([(2, 1.0), (4, 0.5), (8, 0.7), (4, 1.0)])
    ]
    old = LowRank(rng.standard_normal((OUT, 8)), rng.standard_normal((8, IN)))
    results = []
    for order in ([0, 1, 2, 3], [3, 1, 0, 2]):
        op = aggregate.product([updates[i] for i in order])["up"]
        assert isinstance(op, Operator)
        results.append(merge(old, op, 8))
    assert np.array_equal(results[0].B, results[1].B)
    assert np.array_equal(results[0].A, results[1].A)


@pytest.mark.parametrize("size", [(40, 24), (600, 500), (384, 1536)])
@pytest.mark.parametrize("ranks", [(4,), (4, 8, 16), (16,) * 12])
def test_truncation_is_the_best_one(size: tuple[int, int], ranks: tuple[int, ...]) -> None:
    rng = np.random.default_rng(6)
    rank = 16
    view_a, view_b = (
        rng.standard_normal((rank, size[1])) / size[1] ** 0.5,
        rng.standard_normal((size[0], rank)) / size[0] ** 0.5,
    )
    old = LowRank(view_b, view_a)
    terms = []
    for r in ranks:
        db, da = (
            0.3 * rng.standard_normal((size[0], r)) / size[0] ** 0.5,
            0.3 * rng.standard_normal((r, size[1])) / size[1] ** 0.5,
        )
        terms += [Term(db, view_a[:r]), Term(view_b[:, :r], da), Term(db, da)]
    op = Operator(*size, lambda: terms)
    got = merge(old, op, rank)
    whole = view_b @ view_a + op.dense()
    u, s, vt = np.linalg.svd(whole, full_matrices=False)
    best = (u[:, :rank] * s[:rank]) @ vt[:rank]
    missed, least = np.linalg.norm(whole - got.B @ got.A), np.linalg.norm(whole - best)
    assert missed <= least + 1e-3 * np.linalg.norm(best)


def test_a_single_device_is_followed_exactly() -> None:
    rng = np.random.default_rng(7)
    old = LowRank(np.zeros((OUT, 8)), np.zeros((8, IN)))
    shown = view(old, 4, None, 0, "up", half=False)
    u = update("d0", rng, 4, modules=("up",), view={"up.A": shown.A, "up.B": shown.B})
    op = aggregate.product([u])["up"]
    assert isinstance(op, Operator)
    new = merge(old, op, 8)
    assert relative(new.B @ new.A, moved(u, "up")) < 1e-5


def test_long_run_with_unequal_ranks_does_not_drift() -> None:
    """The drift test, shortened: delta aggregation keeps its distance to the optimum with R_s = the
    largest rank."""
    rng = np.random.default_rng(8)
    ranks, n, server = [2, 2, 4, 4, 8, 8], 24, ServerSide(Stack({}), "j", 1)
    common = (
        rng.standard_normal((n, n)) @ np.diag(np.linspace(1, 0, n) ** 2) @ rng.standard_normal((n, n)) / n
    )
    targets = [common + 0.3 * rng.standard_normal((n, n)) / n**0.5 for _ in ranks]
    goal = sum(targets) / len(targets)
    pair = LowRank(np.zeros((n, 8)), np.zeros((8, n)))
    distances = []
    for _ in range(60):
        updates = []
        for i, (r, t) in enumerate(zip(ranks, targets, strict=True)):
            shown = view(pair, r, None, 0, "up", half=False)
            b, a = shown.B.astype(float), shown.A.astype(float)
            for _step in range(10):
                error = SCALE * b @ a - t
                b, a = b - 0.02 * SCALE * error @ a.T, a - 0.02 * SCALE * b.T @ error
            template = update(
                f"d{i}", rng, r, modules=("up",), size=(n, n), view={"up.A": shown.A, "up.B": shown.B}
            )
            updates.append(
                Update(
                    f"d{i}",
                    1.0,
                    {"up.B": b - shown.B, "up.A": a - shown.A},
                    template.spec,
                    template.view,
                    origin=f"d{i}",
                )
            )
        pair = combine.next_version(
            server, Version(0, {"up": pair}, {"head": np.zeros((3, 5))}, {}, {}), updates, 6, 0
        )[0].pairs["up"]
        distances.append(relative(SCALE * pair.B @ pair.A, goal))
    assert distances[-1] <= 1.05 * min(distances)
    assert distances[-1] < 0.5


def test_factor_space_normalises_by_the_holders_of_a_slot() -> None:
    rng = np.random.default_rng(9)
    wide, narrow = update("d0", rng, 4, modules=("up",)), update("d1", rng, 2, modules=("up",))
    mean = factor_mean([wide, narrow])
    assert np.allclose(mean["up.B"][:, :2], (wide.delta["up.B"][:, :2] + narrow.delta["up.B"]) / 2, atol=1e-6)
    assert np.allclose(mean["up.B"][:, 2:], wide.delta["up.B"][:, 2:], atol=1e-6)
    assert np.allclose(mean["up.A"][2:], wide.delta["up.A"][2:], atol=1e-6)


def test_update_norm_dot_and_scale_agree_with_the_dense_matrix() -> None:
    rng = np.random.default_rng(10)
    a, b = update("d0", rng, 4, keep=0.5), update("d1", rng, 2)
    flat = {
        u.device: np.concatenate([moved(u, m).ravel() for m in ("up", "down")] + [u.delta["head"].ravel()])
        for u in (a, b)
    }
    assert np.isclose(a.norm(), np.linalg.norm(flat["d0"]), rtol=1e-5)
    assert np.isclose(a.dot(b), flat["d0"] @ flat["d1"], rtol=1e-4)
    assert np.isclose(a.scale(0.5).norm(), 0.5 * a.norm())
    half = aggregate.product([a.scale(0.5)])["up"]
    whole = aggregate.product([a])["up"]
    assert isinstance(half, Operator)
    assert isinstance(whole, Operator)
    assert relative(2 * half.dense(), whole.dense()) < 1e-6


def test_balanced_split_has_equal_factors() -> None:
    u, s, vt = np.linalg.svd(np.random.default_rng(11).standard_normal((6, 5)), full_matrices=False)
    pair = balanced(u, s, vt, 3)
    assert np.allclose(np.linalg.norm(pair.B, axis=0), np.linalg.norm(pair.A, axis=1))
