"""The coordinator's seams: one scaled view, updates one by one, what methods add and plan, memory of
devices, carry."""

import tracemalloc
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest

from rankfleet.coordinator import export
from rankfleet.coordinator.aggregate import combine
from rankfleet.coordinator.aggregate.kept import Decoded, Keeper
from rankfleet.coordinator.jobs.spec import read_job
from rankfleet.coordinator.planning.planner import first_value
from rankfleet.coordinator.store.device_states import DeviceStates
from rankfleet.coordinator.store.versions import Registry, Version
from rankfleet.federated.contract.catalogue import build_stack
from rankfleet.federated.contract.contexts import Ask, ServerContext, Tensor
from rankfleet.federated.contract.method import Method
from rankfleet.federated.contract.server_side import ServerSide
from rankfleet.federated.contract.spec import Pair, Spec
from rankfleet.federated.contract.stack import Stack
from rankfleet.federated.contract.tensors import Tensors
from rankfleet.federated.contract.update import LowRank, Update
from rankfleet.federated.errors import Conflict, HookError

from ..world import World, job
from .arrays import relative, update

RNG = np.random.default_rng


class Plain(Method, frozen=True):
    """Nothing."""


class Halves(Method, frozen=True):
    """Sees one update at a time."""

    def weigh(self, update: Update, ctx: ServerContext) -> Update | None:
        return None if update.device == "d1" else update.scale(0.5)


class Doubles(Method, frozen=True):
    """Twice the aggregate, and remembers what it saw."""

    def step(self, change: Any, ctx: ServerContext) -> Any:
        ctx.state["seen"] = [u.device for u in ctx.updates]
        return {k: LowRank(2 * v.B, v.A) if isinstance(v, LowRank) else 2 * v for k, v in change.items()}


class Adds(Method, frozen=True):
    """A counter and a constant beside the factors."""

    def tensors(self, spec: Any, ctx: ServerContext) -> dict[str, Tensor]:
        return {
            "extra.scale": Tensor(np.ones(3)),
            "extra.places": Tensor(np.array([1, 1 << 40]), trained=False),
        }


class Private(Method, frozen=True):
    """A release."""

    releases: ClassVar[bool] = True

    def send(self, delta: Tensors, ctx: Any) -> Tensors:
        return delta


def server(**methods: Method) -> ServerSide:
    return ServerSide(Stack(methods), "job", 3)


def old_of(updates: list[Update], rank: int = 8) -> Version:
    pairs = {m: p for u in updates for m, p in u.spec.pairs.items()}
    start = {
        m: LowRank(RNG(1).standard_normal((p.out, rank)), RNG(2).standard_normal((rank, p.in_)))
        for m, p in pairs.items()
    }
    return Version(0, start, {"head": np.zeros((3, 5), np.float32)}, {}, {})


def test_an_update_has_one_scaled_view() -> None:
    """D10: `delta`, `deltas`, `dense`, `factors`, `norm` agree on what `scale` did."""
    u = update("d0", RNG(0), 2)
    half = u.scale(0.5)
    assert np.array_equal(half.delta["up.B"], u.delta["up.B"] / 2)
    assert np.array_equal(half.deltas("up")[0], u.deltas("up")[0] / 2)
    assert np.array_equal(half.dense()["head"], u.dense()["head"] / 2)
    assert np.allclose(
        half.factors("up").B @ half.factors("up").A, (u.factors("up").B @ u.factors("up").A) / 2
    )
    assert half.norm() == pytest.approx(u.norm() / 2)
    assert half.delta["up.B"].dtype == u.delta["up.B"].dtype
    assert not hasattr(half, "factor")


@pytest.mark.parametrize("space", ["product", "factors"])
def test_weigh_sees_one_at_a_time_and_may_drop(space: str) -> None:
    updates = [update(f"d{i}", RNG(i), 2) for i in range(3)]
    side = ServerSide(Stack({"halves": Halves()}, space), "job", 3)
    old = old_of(updates)
    made, used = combine.next_version(side, old, iter(updates), 3, 0)
    goal, _ = combine.next_version(
        ServerSide(Stack({}, space), "job", 3),
        old,
        iter([updates[0].scale(0.5), updates[2].scale(0.5)]),
        3,
        0,
    )
    assert [u.device for u in used] == ["d0", "d2"]
    assert all(np.array_equal(p.B, goal.pairs[m].B) for m, p in made.pairs.items())


def test_step_in_product_space_gets_the_change_without_the_updates() -> None:
    """Twice the aggregate of everybody is what twice the scaled updates give, up to the server's rank."""
    updates = [update(f"d{i}", RNG(i), 1, modules=("up",)) for i in range(2)]
    side, old = server(doubles=Doubles()), old_of(updates, 24)
    made, used = combine.next_version(side, old, iter(updates), 2, 0)
    goal, _ = combine.next_version(server(), old, iter([u.scale(2.0) for u in updates]), 2, 0)
    assert relative(made.pairs["up"].B @ made.pairs["up"].A, goal.pairs["up"].B @ goal.pairs["up"].A) < 1e-5
    assert side.state["doubles"]["seen"] == ["d0", "d1"]
    assert used == updates
    assert combine.streams(side)


@pytest.mark.parametrize(
    ("name", "space"),
    [
        ("fedbuff", "product"),
        ("fedbuff", "factors"),
        ("norm_bound", "factors"),
        ("fedadam", ""),
        ("fedit", ""),
        ("ffa_lora", ""),
    ],
)
def test_memory_does_not_grow_with_the_fleet(name: str, space: str) -> None:
    """A further update that the keeper has no room for takes its entry in a list, and none of its tensors."""
    like = update("v", RNG(0), 2, size=(800, 600))
    size = sum(t.nbytes for t in like.sent.values())

    def peak(count: int) -> int:
        keeper = Keeper(0.0, 0.05)

        def decoded(n: int) -> Tensors:
            return {k: RNG(n).standard_normal(t.shape).astype(np.float32) for k, t in like.sent.items()}

        many = (
            Update(f"d{n:03}", 1.0, Decoded(keeper, partial(decoded, n)), like.spec, like.view, origin="v")
            for n in range(count)
        )
        side, old = ServerSide(Stack(build_stack([name]), space), "job", 3), old_of([like], 2)
        tracemalloc.start()
        combine.next_version(side, old, many, count, 0)
        most = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return most

    assert peak(320) - peak(40) < 0.1 * 280 * size


def test_two_methods_do_not_add_one_name_and_nobody_adds_a_factor() -> None:
    with pytest.raises(Conflict, match="`b` adds `extra.places`|`b` adds `extra.scale`"):
        server(a=Adds(), b=Adds()).tensors(update("d", RNG(0), 2).spec)


def test_dtypes_of_what_is_added_are_kept() -> None:
    assert first_value(np.ones(2)).dtype == np.float32
    assert first_value(np.array([True])).dtype == np.bool_
    assert int(first_value(np.array([1 << 40]))[0]) == 1 << 40


class Places(Method, frozen=True):
    """One map at rank 0, the others at rank 1, none for the last one."""

    rank: int = 1

    def plan(self, ask: Ask, device: str, ctx: ServerContext) -> Ask:
        names = list(ask["placement"])
        return {**ask, "placement": {m: 0 if m == names[0] else self.rank for m in names[:-1]}, "steps": 2}


def test_plan_may_place_but_not_exceed() -> None:
    """D6: the placement counts, rank 0 too; what the device cannot hold is an author's error."""
    asked: Ask = {"placement": {"a": 2, "b": 2, "c": 2}, "rank": 2, "steps": 8, "lr": 0.1}
    assert server(p=Places()).plan(asked, "d", 0) == {
        "placement": {"a": 0, "b": 1},
        "rank": 2,
        "steps": 2,
        "lr": 0.1,
    }
    with pytest.raises(HookError, match="method `p`, hook `plan`: gives `b` rank 3, at most 2"):
        server(p=Places(rank=3)).plan(asked, "d", 0)


def test_a_release_refuses_what_tells_of_examples() -> None:
    """D9."""
    for first in ("scaffold", "power_of_choice"):
        with pytest.raises(Conflict, match=f"`{first}` tells what it makes of examples"):
            Stack({**build_stack([first]), "private": Private()})
    Stack({**build_stack(["fedprox"]), "private": Private()})


def test_codecs_come_last_and_one_takes_tensors() -> None:
    Stack(build_stack(["scaffold", "sparse", "qsgd"]))
    for stack in (["sparse", "scaffold"], ["qsgd", "sparse"]):
        with pytest.raises(Conflict, match="has coded"):
            Stack(build_stack(stack))


def test_what_a_hook_gives_is_checked_by_name() -> None:
    class Wrong(Method, frozen=True):
        def step(self, change: Any, ctx: ServerContext) -> Any:
            return {"head": np.zeros(2)}

    updates = [update("d0", RNG(0), 2)]
    with pytest.raises(HookError, match="method `w`, hook `step`: changes `head`"):
        combine.next_version(server(w=Wrong()), old_of(updates), iter(updates), 1, 0)


def test_an_upload_costs_what_the_codec_says() -> None:
    assert Stack({}).wire_bits(1000) == 32_000
    assert Stack(build_stack(["qsgd"])).wire_bits(1000) == 8_000
    # a quarter of the entries: entropy 0.811 bits for the index, 2 bits of values, 5% for framing
    assert Stack(build_stack(["sparse"])).wire_bits(1000) == pytest.approx(
        1000 * (0.8113 + 2) * 1.05, rel=1e-3
    )


def test_memory_of_devices_follows_the_version(tmp_path: Path) -> None:
    states = DeviceStates(tmp_path)
    states.of("m", "a")["n"] = np.array([1.0])
    states.keep(1)
    states.at(1)
    states.of("m", "a")["n"] = np.array([2.0])
    states.of("m", "a@b")["n"] = 7
    states.keep(2)  # the closing is cut off here: version 2 was never recorded
    again = DeviceStates(tmp_path)
    again.at(1)
    assert again.of("m", "a")["n"].tolist() == [1.0]
    assert again.of("m", "a@b") == {}
    again.keep(2)  # closed again, and nothing changed: what the cut-off closing left is gone
    again.at(2)
    assert again.of("m", "a")["n"].tolist() == [1.0]


def test_a_carry_adds_up_and_never_outgrows_the_map(tmp_path: Path) -> None:
    total: dict[str, LowRank] = {}
    goal = np.zeros((6, 5))
    for n in range(5):
        new = LowRank(RNG(n).standard_normal((6, 2)), RNG(9 + n).standard_normal((2, 5)))
        total, goal = combine.carried(total, {"m": new}), goal + new.B @ new.A
    assert total["m"].B.shape[1] == 5
    assert np.allclose(total["m"].B @ total["m"].A, goal, atol=1e-5)
    version = Version(0, {"m": LowRank(np.zeros((6, 1)), np.zeros((1, 5)))}, {}, {}, {})
    version.carry = total
    Registry(tmp_path).save(version)
    assert np.array_equal(Registry(tmp_path).load(0).carry["m"].B, total["m"].B)


def test_export_shows_what_the_model_computes_with() -> None:
    """Pairs by `express`, the carry as further rank without s, and none of the tensors that they were made
    of."""
    spec = read_job(job(stack=["fed_sb"]))
    side = server(fed_sb=build_stack(["fed_sb"])["fed_sb"])
    maps = Spec({"m": Pair(0, 6, 5, 0, 2.0, 6, 5, "v")}, {})
    added = {k: t.value for k, t in side.tensors(maps).items()}
    core = RNG(0).standard_normal(added["m.R"].shape)
    version = Version(
        3,
        {"m": LowRank(np.zeros((6, 2)), np.zeros((2, 5)))},
        {**added, "m.R": core, "head.bias": np.ones(4)},
        {},
        {},
    )
    version.carry = {"m": LowRank(RNG(1).standard_normal((6, 1)), RNG(2).standard_normal((1, 5)))}
    made = export.shown(version, spec)
    goal = 2 * added["m.left"] @ core @ added["m.right"].T + version.carry["m"].B @ version.carry["m"].A
    assert np.allclose(2 * made.pairs["m"].B @ made.pairs["m"].A, goal)
    assert list(made.dense) == ["head.bias"]


async def test_constants_travel_once_in_their_dtype(
    tmp_path: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The blob of constants has one digest in all rounds, and no device sends any."""
    from rankfleet.coordinator.store import tables
    from rankfleet.federated.wire.messages import read_assignment

    async with World(tmp_path, tiny, devices=2) as world:
        name = await world.run(
            job(rounds=2, stack=["fed_sb"], arms={"ranks": [2], "bits": [32], "steps": [2], "batch": 4})
        )
        rows = world.coordinator.ledger.rows(tables.assignments, job=name)
        blobs = [read_assignment(r["body"]).blobs for r in rows]
        assert len({b["constants"].digest for b in blobs}) == 1
        assert len({b["view"].digest for b in blobs}) > 1
        first, last = (Registry(world.coordinator.config.home / "jobs" / name).load(n) for n in (0, 2))
        assert any(not np.array_equal(t, first.dense[k]) for k, t in last.dense.items() if k.endswith(".R"))
        assert all(
            np.array_equal(t, first.dense[k])
            for k, t in last.dense.items()
            if k.endswith((".left", ".right"))
        )


async def test_a_job_begins_on_anothers_frozen_adapter(tmp_path: Path, tiny: Path) -> None:
    async with World(tmp_path, tiny, devices=2) as world:
        arms = {"ranks": [2], "bits": [32], "steps": [4], "batch": 4}
        one = await world.run(job(rounds=2, arms=arms))
        two = await world.run(job(name="more", rounds=1, arms=arms, start=one, frozen=True))
        home = world.coordinator.config.home / "jobs"
        last, begun, done = (
            Registry(home / one).load(2),
            Registry(home / two).load(0),
            Registry(home / two).load(1),
        )
        for m, p in last.pairs.items():
            assert np.allclose(begun.carry[m].B @ begun.carry[m].A, 2 * p.B @ p.A, atol=1e-6)
            assert not np.any(begun.pairs[m].B)
            assert np.array_equal(done.carry[m].B, begun.carry[m].B)
