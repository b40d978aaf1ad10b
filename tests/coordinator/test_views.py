"""Views: nothing dies at zero, ranks go up and down without changing the function, state keeps its
meaning."""

import numpy as np
import pytest

from rankfleet.coordinator.aggregate.stacked import Operator, merge, product
from rankfleet.coordinator.planning.views import fill_empty, fresh_factors, grow, view
from rankfleet.federated.contract.update import LowRank, Update

from .arrays import IN, OUT, relative, update


def low_rank(rank: int, slots: int, seed: int = 0) -> LowRank:
    rng = np.random.default_rng(seed)
    u, _ = np.linalg.qr(rng.standard_normal((20, rank)))
    v, _ = np.linalg.qr(rng.standard_normal((12, rank)))
    root = np.sqrt(np.linspace(2, 1, rank))
    b, a = np.zeros((20, slots)), np.zeros((slots, 12))
    b[:, :rank], a[:rank] = u * root, (v * root).T
    return LowRank(b, a)


def slots_that_can_move(shown: LowRank) -> np.ndarray:
    """‖∂L/∂B[:, j]‖ + ‖∂L/∂A[j]‖ of L = ½‖BA - T‖² for a random T: a slot with zero here stays for ever."""
    error = shown.B @ shown.A - np.random.default_rng(1).standard_normal((20, 12))
    return np.linalg.norm(error @ shown.A.T, axis=0) + np.linalg.norm(shown.B.T @ error, axis=1)


@pytest.mark.parametrize("have", [0, 4])
def test_every_slot_of_a_rank_16_device_moves(have: int) -> None:
    pair = low_rank(have, 16) if have else LowRank(np.zeros((20, 16)), np.zeros((16, 12)))
    shown = view(LowRank(pair.B, pair.A), 12, None, 0, "m", half=True)
    assert (slots_that_can_move(shown) > 1e-3).all()
    assert relative(shown.B @ shown.A, pair.B @ pair.A) < 1e-2 if have else np.allclose(shown.B @ shown.A, 0)


def test_rank_up_leaves_the_function_rank_down_loses_the_tail() -> None:
    pair = low_rank(6, 6)
    wide = view(grow(pair, 10), 10, None, 0, "m", half=False)
    assert relative(wide.B @ wide.A, pair.B @ pair.A) < 1e-6
    narrow = view(pair, 4, None, 0, "m", half=False)
    tail = np.linalg.norm(np.linalg.svd(pair.B @ pair.A)[1][4:])
    assert np.isclose(np.linalg.norm(narrow.B @ narrow.A - pair.B @ pair.A), tail, rtol=1e-5)


def test_a_view_is_turned_onto_the_last_one() -> None:
    pair = low_rank(4, 4)
    last = view(pair, 4, None, 0, "m", half=False)
    u, _ = np.linalg.qr(np.random.default_rng(3).standard_normal((4, 4)))
    disguised = LowRank(pair.B @ u, u.T @ pair.A)
    again = view(disguised, 4, last, 0, "m", half=False)
    assert np.allclose(again.B, last.B, atol=1e-5)
    assert np.allclose(again.A, last.A, atol=1e-5)
    assert not np.allclose(view(disguised, 4, None, 0, "m", half=False).B, last.B, atol=1e-2)


def test_half_views_are_exactly_fp16() -> None:
    shown = view(low_rank(4, 4), 4, None, 0, "m", half=True)
    assert np.array_equal(shown.A, shown.A.astype(np.float16).astype(np.float32))


def test_filled_rows_are_orthonormal_and_orthogonal_to_the_others() -> None:
    pair = low_rank(3, 8)
    b, a = fill_empty(pair.B, pair.A, 0, "m")
    fresh = a[3:]
    assert np.allclose(fresh @ fresh.T, np.eye(5), atol=1e-9)
    assert np.allclose(fresh @ a[:3].T, 0, atol=1e-9)
    assert np.allclose(b[:, 3:], 0)


def test_fresh_factors_are_nested_over_ranks() -> None:
    small, large = fresh_factors(20, 12, 3, 5, "m"), fresh_factors(20, 12, 8, 5, "m")
    assert np.allclose(small.A @ small.A.T, np.eye(3), atol=1e-6)
    assert large.A.shape == (8, 12)


@pytest.mark.parametrize("rounds", [0, 1])
def test_a_rank_16_device_after_rounds_of_rank_4_devices_only(rounds: int) -> None:
    """The global pair after `rounds` real aggregations of rank-4 devices, from zero; then every slot of
    rank 16 can move."""
    rng = np.random.default_rng(0)
    pair = LowRank(np.zeros((OUT, 16)), np.zeros((16, IN)))
    for number in range(rounds):
        shown = view(pair, 4, None, 0, "up", half=True)
        devices = [
            update(f"d{i}", rng, 4, modules=("up",), view={"up.A": shown.A, "up.B": shown.B})
            for i in range(3)
        ]
        change = product(
            [Update(u.device, 1.0, u.delta, u.spec, u.view, origin=f"v{number}") for u in devices]
        )["up"]
        assert isinstance(change, Operator)
        pair = merge(pair, change, 16)
    shown = view(pair, 16, None, 0, "up", half=True)
    error = shown.B @ shown.A - rng.standard_normal((OUT, IN))
    moves = np.linalg.norm(error @ shown.A.T, axis=0) + np.linalg.norm(shown.B.T @ error, axis=1)
    assert (moves > 1e-3).all()
    assert np.linalg.norm(shown.B @ shown.A) > (1.0 if rounds else -1.0)
