"""Each method against numbers worked out by hand from the equation that its docstring cites."""

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rankfleet.federated.contract.catalogue import build
from rankfleet.federated.contract.contexts import Arrival, ClientContext, Member, Round, ServerContext
from rankfleet.federated.contract.spec import Dense, Pair, Spec
from rankfleet.federated.contract.update import Update
from rankfleet.federated.errors import WireError
from rankfleet.federated.methods.codecs.sparse import decode, encode

RNG = np.random.default_rng


def server(state: dict | None = None, fleet: int = 2) -> ServerContext:
    return ServerContext(Round(1, 5), {} if state is None else state, RNG(0), fleet, "factors")


def spec(*shapes: tuple[str, tuple[int, ...]]) -> Spec:
    return Spec({}, {k: Dense(s) for k, s in shapes})


def client(state: dict | None = None, of: Spec | None = None) -> ClientContext:
    return ClientContext(
        Round(1, 5), "d0", of or spec(), {}, {} if state is None else state, RNG(0), {}, {}, 2, 0.1
    )


def update(device: str, delta: dict[str, Any], weight: float = 1.0, **kw: Any) -> Update:
    arrays = {k: np.asarray(v, np.float32) for k, v in delta.items()}
    return Update(device, weight, arrays, spec(*((k, t.shape) for k, t in arrays.items())), {}, **kw)


def step(**kw: Any) -> Any:
    return SimpleNamespace(
        **{
            "round": Round(1, 5),
            "state": {},
            "up": {},
            "down": {},
            "steps": 2,
            "lr": 0.1,
            "received": {},
            **kw,
        }
    )


def test_fedprox_pulls_towards_what_was_received() -> None:
    # eq. 2: g + μ(w - w^t) = [1, 1] + 0.5·([3, 0] - [1, 2]) = [2, 0]
    got = build("fedprox", {"mu": 0.5}).grad(
        {"w": torch.ones(2)}, {"w": torch.tensor([3.0, 0.0])}, step(received={"w": torch.tensor([1.0, 2.0])})
    )
    assert got["w"].tolist() == [2.0, 0.0]


def test_scaffold_corrects_and_moves_its_variates() -> None:
    m = build("scaffold")
    ctx = step(state={"c": {"w": np.array([1.0, 0.0], np.float32)}}, down={"w": torch.tensor([0.5, 0.5])})
    # eq. 3: g - c_i + c = [2, 2] - [1, 0] + [.5, .5]
    assert m.grad({"w": torch.tensor([2.0, 2.0])}, {}, ctx)["w"].tolist() == [1.5, 2.5]
    m.grad({"w": torch.tensor([4.0, 0.0])}, {}, ctx)
    sending = client(ctx.state)
    m.send({"w": np.zeros(2)}, sending)
    # c_i⁺ is the mean raw gradient [3, 1]; what travels is its change [2, 1]
    assert sending.state["c"]["w"].tolist() == [3.0, 1.0]
    assert sending.up["w"].tolist() == [2.0, 1.0]
    # c ← c + Σ change / N with N = 4
    ctx2 = server({"c": {"w": np.array([1.0, 1.0], np.float32)}}, fleet=4)
    m.admit([update("d0", {"w": [0, 0]}, extra={"scaffold": {"w": np.array([2.0, 1.0], np.float32)}})], ctx2)
    assert ctx2.state["c"]["w"].tolist() == [1.5, 1.25]


def test_scaffold_equals_option_two_under_sgd() -> None:
    m, lr, c, ci = build("scaffold"), 0.1, 0.3, -0.2
    ctx = step(state={"c": {"w": np.array([ci], np.float32)}}, down={"w": torch.tensor([c])})
    w = x = torch.tensor([1.0])
    for _ in range(5):
        w = w - lr * m.grad({"w": 2 * w}, {}, ctx)["w"]
    sending = client(ctx.state)
    m.send({"w": np.zeros(1)}, sending)
    assert sending.state["c"]["w"] == pytest.approx((ci - c + (x - w) / (5 * lr)).numpy(), rel=1e-5)


def test_ffa_trains_everything_but_a() -> None:
    m = build("ffa_lora")
    assert [m.trains(n, Round(0, 1)) for n in ("x.A", "x.B", "head.weight")] == [False, True, True]


def test_fedit_averages_factors_apart_and_pads() -> None:
    pair = {r: Spec({"m": Pair(0, 2, 2, r, 1.0, 2, 2, "v")}, {}) for r in (1, 2)}
    a = Update("a", 3.0, {"m.B": np.array([[4.0], [0.0]], np.float32)}, pair[1], {})
    b = Update("b", 1.0, {"m.B": np.array([[0.0, 8.0], [4.0, 4.0]], np.float32)}, pair[2], {})
    # slot 0: .75·[4,0] + .25·[0,4]; slot 1 only in b, shrunk by its weight: .25·[8,4]
    assert build("fedit").reduce([a, b], server())["m.B"].tolist() == [[3.0, 2.0], [1.0, 1.0]]


def test_fedadam_first_and_second_step() -> None:
    m = build("fedadam", {"lr": 1.0, "beta1": 0.5, "beta2": 0.75, "tau": 1.0})
    ctx = server()
    # m = .5·2 = 1, v = .25·4 = 1 → 1/(1+1); then m = .5+1 = 1.5, v = .75+1 = 1.75
    assert m.step({"w": np.array([2.0])}, ctx)["w"] == pytest.approx([0.5])
    assert m.step({"w": np.array([2.0])}, ctx)["w"] == pytest.approx([1.5 / (1.75**0.5 + 1)])


def test_fedbuff_closes_when_full_and_discounts_by_age() -> None:
    m = build("fedbuff", {"size": 3})
    there = [Arrival(str(n), 1.0, {}) for n in range(3)]
    assert [m.ready(there[:n], ["x"], 0.0, server()) for n in (2, 3)] == [False, True]
    assert m.ready(there[:2], [], 0.0, server())
    got = [m.weigh(u, server()) for u in (update("a", {}, 4.0, age=3), update("b", {}, 4.0))]
    assert [u.weight for u in got] == [2.0, 4.0]


def test_norm_bound_cuts_to_the_median() -> None:
    ups = [update("a", {"w": [3, 4]}), update("b", {"w": [0, 1]}), update("c", {"w": [0, 2]})]
    got = build("norm_bound", {"factor": 1.0}).admit(ups, server())
    assert [round(u.norm(), 6) for u in got] == [2.0, 1.0, 2.0]
    assert build("norm_bound").admit([], server()) == []


def test_power_of_choice_asks_everybody_once_then_the_worst() -> None:
    m, ctx = build("power_of_choice", {"cohort": 2}), server()
    devices = [Member(d) for d in "abc"]
    assert [d.device for d in m.select(devices, ctx)] == ["a", "b"]
    for device, loss in (("a", 1.0), ("b", 3.0), ("c", 2.0)):
        m.receive({}, update(device, {}, extra={"power_of_choice": {"loss": np.array([loss])}}), ctx)
    assert [d.device for d in m.select(devices, ctx)] == ["b", "c"]
    watching = client({})
    m.begin({}, watching)
    for value in (2.0, 4.0):
        m.loss(torch.tensor(value), {}, {}, watching)  # type: ignore[arg-type]
    m.send({}, watching)
    assert watching.up["loss"] == pytest.approx([3.0])


def test_ditto_keeps_a_personal_adapter_tied_to_the_global_one() -> None:
    m = build("ditto", {"tie": 2.0})
    penalties = []

    def fit(start: dict, penalty: Any = None) -> dict:
        penalties.append(None if penalty is None else float(penalty({"w": torch.tensor([3.0])})))
        return {"w": start["w"] + (1.0 if penalty is None else 10.0)}

    ctx = step(fit=fit, received={"w": torch.tensor([1.0])})
    assert m.train({"w": torch.tensor([1.0])}, ctx)["w"].tolist() == [2.0]
    # λ/2·‖3 - 1‖² = 4
    assert penalties == [None, 4.0]
    assert m.serve({"w": np.array([7.0], np.float32)}, client(ctx.state))["w"].tolist() == [11.0]
    m.train({"w": torch.tensor([1.0])}, ctx)
    assert ctx.state["personal"]["w"].tolist() == [21.0]


@given(st.integers(1, 400), st.floats(0.01, 1.0), st.integers(0, 99))
@settings(max_examples=60, deadline=None)
def test_sparse_bytes_decode_to_what_the_sender_expects(size: int, keep: float, seed: int) -> None:
    values = RNG(seed).standard_normal(size).astype(np.float32)
    body, expected = encode(values, keep)
    assert np.array_equal(decode(body, size), expected)
    assert np.count_nonzero(expected) <= max(1, int(keep * size))


@given(st.binary(max_size=80), st.integers(1, 200))
def test_sparse_hostile_bytes(data: bytes, size: int) -> None:
    try:
        assert decode(data, size).shape == (size,)
    except WireError as error:
        assert str(error)


def test_sparse_bits_are_near_entropy() -> None:
    values = RNG(0).standard_normal(100_000).astype(np.float32)
    for keep in (1 / 4, 1 / 16):
        body, _ = encode(values, keep)
        index = -keep * np.log2(keep) - (1 - keep) * np.log2(1 - keep)
        assert 8 * len(body) / values.size < 1.04 * (index + 8 * keep)


def test_sparse_never_loses_anything_for_good() -> None:
    m = build("sparse", {"keep": 0.1})
    of = Spec({"m": Pair(0, 8, 6, 2, 1.0, 8, 6, "v")}, {"head": Dense((5,))})
    state: dict[str, Any] = {}
    truth = {
        "m.A": RNG(1).standard_normal((2, 6)).astype(np.float32),
        "m.B": RNG(2).standard_normal((8, 2)).astype(np.float32),
        "head": RNG(3).standard_normal(5).astype(np.float32),
    }
    arrived = {k: np.zeros_like(t) for k, t in truth.items()}
    for number in range(60):
        delta = truth if number == 0 else {k: np.zeros_like(t) for k, t in truth.items()}
        sent = m.send(delta, client(state, of))
        blank = Update("d0", 1.0, sent, of, {})
        for k, t in m.receive(sent, blank, server()).items():
            arrived[k] = arrived[k] + t
    for k, t in truth.items():
        assert np.allclose(arrived[k], t, atol=0.02), k


def test_sparse_with_names_that_come_and_go() -> None:
    m = build("sparse", {"keep": 1.0})
    of = Spec({"m": Pair(0, 8, 6, 2, 1.0, 8, 6, "v")}, {"head": Dense((5,))})
    delta = {"m.B": np.ones((8, 2), np.float32), "head": np.ones(5, np.float32)}
    sent = m.send(delta, client({}, of))
    got = m.receive(sent, Update("d0", 1.0, sent, of, {}), server())
    assert set(got) == {"m.B", "head"}
    with pytest.raises(WireError, match="NaN"):
        m.send({"head": np.full(5, np.nan, np.float32)}, client({}, of))


def test_qsgd_is_unbiased_and_passes_other_dtypes() -> None:
    m = build("qsgd", {"levels": 4})
    value = {"w": np.array([0.3, -1.0, 0.9], np.float32), "packed": np.arange(3, dtype=np.uint8)}
    total = np.zeros(3)
    for seed in range(2000):
        ctx = replace(client(), rng=RNG(seed), up={})
        sent = m.send(value, ctx)
        assert sent["w"].dtype == np.int8
        back = m.receive(sent, Update("d0", 1.0, sent, spec(), {}, extra={"qsgd": ctx.up}), server())
        assert back["packed"] is value["packed"]
        total += back["w"]
    assert total / 2000 == pytest.approx(value["w"], abs=0.02)
    with pytest.raises(WireError, match="scale without a tensor"):
        m.receive({}, Update("d0", 1.0, {}, spec(), {}, extra={"qsgd": {"w": np.ones(1)}}), server())
