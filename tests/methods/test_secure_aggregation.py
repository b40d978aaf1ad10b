"""Secure aggregation: masks cancel, the sum is the plain one, who drops out is recovered from, one upload
says nothing."""

import asyncio
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from rankfleet.coordinator.aggregate import combine
from rankfleet.coordinator.store import tables
from rankfleet.coordinator.store.versions import Registry, Version
from rankfleet.edge_agent.order import Order
from rankfleet.federated.contract.catalogue import build_stack
from rankfleet.federated.contract.contexts import Adapter, Round
from rankfleet.federated.contract.server_side import ServerSide
from rankfleet.federated.contract.spec import Spec
from rankfleet.federated.contract.stack import Stack
from rankfleet.federated.contract.update import Update
from rankfleet.federated.errors import Conflict, Refused
from rankfleet.federated.methods.privacy.secure_aggregation import SecureAggregation, mask, seed, sign

from ..world import World, job

SHAPE = (4, 50)


class Fleet:
    """The method's hooks by hand: three devices, one tensor `w`."""

    def __init__(self, method: SecureAggregation, deltas: dict[str, Any]) -> None:
        self.m, self.deltas = method, deltas
        self.states: dict[str, dict[str, Any]] = {d: {} for d in deltas}
        self.server: dict[str, Any] = {}
        self.adapter = Adapter({}, {"w": np.zeros(SHAPE, np.float32)})

    def ctx(self, leg: str, **more: Any) -> Any:
        return SimpleNamespace(
            round=Round(0, 1, leg), adapter=self.adapter, down={}, up={}, **{"state": self.server, **more}
        )

    def asked(self, leg: str, who: list[str]) -> dict[str, Any]:
        said = {}
        for d in who:
            question = self.m.ask(d, self.ctx(leg))
            assert question is not None
            said[d] = self.m.answer(question, self.ctx(leg, device=d, state=self.states[d]))
        return said

    def keys(self) -> None:
        assert self.m.hear(self.asked("keys", sorted(self.deltas)), self.ctx("keys")) == {}

    def sends(self, device: str) -> dict[str, Any]:
        down = self.ctx("train")
        self.m.offer({}, device, down)
        ctx = SimpleNamespace(
            round=Round(0, 1, "train"),
            device=device,
            down=down.down,
            up={},
            state=self.states[device],
            spec=SimpleNamespace(pairs={}),
        )
        assert self.m.send({"w": self.deltas[device]}, ctx) == {}  # type: ignore[arg-type]
        return ctx.up

    def trains(self, who: list[str]) -> dict[str, dict[str, Any]]:
        ups = {d: self.sends(d) for d in who}
        updates: Any = [
            SimpleNamespace(device=d, age=0, extra_of=lambda m, up=up: up) for d, up in ups.items()
        ]
        assert self.m.reduce(updates, self.ctx("train")) == {}
        return ups


def fleet(**settings: Any) -> Fleet:
    rng = np.random.default_rng(0)
    deltas = {d: rng.normal(scale=0.1, size=SHAPE).astype(np.float32) for d in ("d0", "d1", "d2")}
    return Fleet(SecureAggregation(**settings), deltas)


def test_masks_of_a_pair_cancel_exactly() -> None:
    f = fleet()
    f.keys()
    keys = f.server["keys"]
    one, other = seed(f.states["d0"], keys["d1"]), seed(f.states["d1"], keys["d0"])
    assert one == other != seed(f.states["d0"], keys["d2"])
    assert not (mask(one, "w", SHAPE) * sign("d0", "d1") + mask(other, "w", SHAPE) * sign("d1", "d0")).any()
    assert (mask(one, "w", SHAPE) != mask(one, "v", SHAPE)).any()


def test_fixed_point_by_hand() -> None:
    # 4 steps are 1: 0.5 is 2, -0.25 is -1 = 2³² - 1, 3 is clipped to 1 and so is 4 steps
    got = SecureAggregation(one=4).fixed(np.array([0.5, -0.25, 3.0], np.float32))
    assert got.dtype == np.uint32
    assert got.tolist() == [2, 2**32 - 1, 4]


def test_the_sum_is_the_plain_sum() -> None:
    f = fleet()
    f.keys()
    ups = f.trains(["d0", "d1", "d2"])
    whole = sum(u["masked w"].astype(np.uint64) for u in ups.values()) % (1 << 32)
    assert (whole == sum(f.m.fixed(t).astype(np.uint64) for t in f.deltas.values()) % (1 << 32)).all()
    got = f.m.hear(f.asked("unmask", ["d0", "d1", "d2"]), f.ctx("unmask"))["w"]
    wanted = sum(t.astype(np.float64) for t in f.deltas.values()) / 3
    assert np.abs(got - wanted).max() <= 0.5 / f.m.one + 1e-7
    assert f.server == {}


def test_devices_of_unlike_rank_cancel() -> None:
    f = fleet()
    f.deltas["d1"] = f.deltas["d1"][:2]
    f.keys()
    f.trains(["d0", "d1", "d2"])
    got = f.m.hear(f.asked("unmask", ["d0", "d1", "d2"]), f.ctx("unmask"))["w"]
    wanted = f.deltas["d0"].astype(np.float64) + f.deltas["d2"]
    wanted[:2] += f.deltas["d1"]
    assert np.abs(got - wanted / 3).max() <= 0.5 / f.m.one + 1e-7


def test_clipped_entries_are_counted() -> None:
    f = fleet(bound=0.1)
    f.keys()
    up = f.sends("d1")
    assert int(up["beyond"][0]) == int((np.abs(f.deltas["d1"]) > np.float32(0.1)).sum()) > 0


def test_a_device_lost_before_train_is_recovered_from() -> None:
    f = fleet()
    f.keys()
    f.trains(["d0", "d2"])
    answers = f.asked("unmask", ["d0", "d2"])
    assert {d: sorted(a) for d, a in answers.items()} == {"d0": ["d1"], "d2": ["d1"]}
    got = f.m.hear(answers, f.ctx("unmask"))["w"]
    wanted = (f.deltas["d0"].astype(np.float64) + f.deltas["d2"]) / 2
    assert np.abs(got - wanted).max() <= 0.5 / f.m.one + 1e-7


def test_without_all_seeds_the_sum_stays_closed() -> None:
    f = fleet()
    f.keys()
    f.trains(["d0", "d2"])
    assert f.m.hear(f.asked("unmask", ["d0"]), f.ctx("unmask")) == {}
    assert f.server == {"closed": 1}


def test_without_a_lost_device_nobody_is_needed() -> None:
    f = fleet()
    f.keys()
    f.trains(["d0", "d1", "d2"])
    assert f.m.hear(f.asked("unmask", ["d1"]), f.ctx("unmask"))["w"].shape == SHAPE


def test_devices_tell_nothing_that_would_leave_too_few() -> None:
    f = fleet(least=3)
    f.keys()
    f.trains(["d0", "d2"])
    assert f.asked("unmask", ["d0", "d2"]) == {"d0": {}, "d2": {}}
    few = fleet(least=4)
    few.keys()
    with pytest.raises(Refused, match="3 devices gave keys, a sum is made of 4"):
        few.sends("d0")


def test_one_upload_looks_uniform() -> None:
    """χ² over 256 classes of each byte; 255 degrees of freedom, 340 is passed once in some four thousand,
    and zeros give 510 000."""
    f = fleet()
    f.deltas = {d: np.zeros((40, 50), np.float32) for d in f.deltas}
    f.adapter = Adapter({}, {"w": np.zeros((40, 50), np.float32)})
    rng = np.random.default_rng(1)
    for d in f.states:  # seeded here, so that the test says the same in every run
        f.states[d] = {"round": 0, "secret": np.frombuffer(rng.bytes(32), np.uint8)}
    f.keys()
    sent = f.sends("d1")["masked w"]
    for shift in (0, 8, 16, 24):
        counts = np.bincount((sent >> np.uint32(shift)).ravel() & 255, minlength=256)
        assert ((counts - sent.size / 256) ** 2 / (sent.size / 256)).sum() < 340


@pytest.mark.parametrize("neighbour", ["norm_bound", "qsgd", "sparse", "fedbuff", "scaffold"])
def test_who_looks_at_single_updates_is_refused_with_both_names(neighbour: str) -> None:
    for stack in (["secure_aggregation", neighbour], [neighbour, "secure_aggregation"]):
        with pytest.raises(Conflict) as refused:
            Stack(build_stack(stack))
        assert "`secure_aggregation`" in str(refused.value)
        assert f"`{neighbour}`" in str(refused.value)


@pytest.mark.parametrize(("leg", "number"), [("train", 1), ("unmask", 2)])
async def test_a_device_dies_between_legs(tmp_path: Path, tiny: Path, leg: str, number: int) -> None:
    """Killed when its answer to the leg before is counted, before it can give this one's; the round closes
    and moves the adapter."""
    arms = {"ranks": [2], "bits": [32], "steps": [2], "batch": 4}
    text = job(rounds=1, stack=["secure_aggregation"], quorum=0.5, deadline_s=1, late="drop", arms=arms)
    async with World(tmp_path, tiny) as world:
        hang(world, "d1", number)
        ledger, name = world.coordinator.ledger, world.coordinator.jobs.submit(text)
        await world.until(lambda: bool(ledger.rows(tables.assignments, job=name, round=number)))
        await world.kill_agent("d1")
        await world.until(
            lambda: [r["state"] for r in ledger.rows(tables.rounds, job=name)][:3] == ["closed"] * 3
        )
        states = {r["device"]: r["state"] for r in ledger.rows(tables.assignments, job=name, round=number)}
        assert states == {"d0": "counted", "d1": "late", "d2": "counted"}
        versions = [flat(Registry(tmp_path / "coordinator" / "jobs" / name).load(n)) for n in range(4)]
        assert np.array_equal(versions[0], versions[1])
        assert np.array_equal(versions[0], versions[2])
        moved = np.abs(versions[3] - versions[0])
        assert 0 < moved.max() < 0.1, (
            "two steps of AdamW at 0.01; an open mask would move everything by up to a half of 2¹⁵"
        )
        await world.start_agent("d1")
        await world.until(lambda: world.job_state(name) == "finished")


def flat(version: Version) -> Any:
    """All of a version's numbers in one row."""
    parts = [
        *(t for _, p in sorted(version.pairs.items()) for t in p),
        *(t for _, t in sorted(version.dense.items())),
    ]
    return np.concatenate([t.ravel() for t in parts])


def hang(world: World, device: str, number: int) -> None:
    """This device never gets through a leg."""
    engine = world.agents[device][0].engine
    real = engine.run

    async def run(order: Order, progress: Any) -> None:
        if Path(order.result).name == f"r{number:06d}":
            await asyncio.Event().wait()
        await real(order, progress)

    engine.run = run  # type: ignore[method-assign]


def test_a_late_key_is_not_heard() -> None:
    server = ServerSide(Stack(build_stack(["secure_aggregation"])), "job", 6)
    old, key = (
        Version(0, {}, {"w": np.zeros(2, np.float32)}, {}, {}),
        {"secure_aggregation": {"key": np.ones(32, np.uint8)}},
    )
    now, late = (
        Update(d, 1.0, {}, Spec({}, {}), {}, extra=key, age=age, space="factors")
        for d, age in (("d0", 0), ("d1", 3))
    )
    combine.next_version(server, old, [now, late], 2, 3)
    assert list(server.state["secure_aggregation"]["keys"]) == ["d0"]


def test_a_server_rule_behind_it_steps_once_a_round_on_the_sum() -> None:
    """In the unmask leg, where the change is known; not in the others, where there is none."""
    seen: list[dict[str, Any]] = []
    server = ServerSide(Stack(build_stack(["secure_aggregation", "fedavgm"])), "job", 3)
    real = server.step
    server.step = lambda change, number: seen.append(dict(change)) or real(change, number)  # type: ignore[func-returns-value, method-assign]
    old = Version(0, {}, {"w": np.zeros(2, np.float32)}, {}, {})
    own = server.state["secure_aggregation"]
    own["keys"] = {d: np.zeros(32, np.uint8) for d in ("d0", "d1")}

    def update(device: str, extra: dict[str, Any], age: int = 0) -> Update:
        return Update(
            device, 1.0, {}, Spec({}, {}), {}, extra={"secure_aggregation": extra}, age=age, space="factors"
        )

    m = SecureAggregation()
    sent = [update(d, {"masked w": m.fixed(np.array([0.5, v]))}) for d, v in (("d0", 0.25), ("d1", -0.75))]
    late = update("d1", {"masked w": np.full(2, 7, np.uint32)}, age=3)
    between, _ = combine.next_version(server, old, [*sent, late], 3, 1)
    assert not between.dense["w"].any()
    assert seen == []
    assert own["sent"] == ["d0", "d1"]
    after, _ = combine.next_version(
        server,
        between,
        [update("d0", {}), update("d1", {}), update("d2", {"d0": np.ones(32, np.uint8)}, 3)],
        3,
        2,
    )
    assert len(seen) == 1
    assert np.allclose(seen[0]["w"], [0.5, -0.25])
    assert after.dense["w"].any()
