"""FUSED: which layers are critical, what may move, and a job that forgets over another one's frozen
adapter."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from rankfleet.coordinator.store import database, tables
from rankfleet.coordinator.store.versions import Registry
from rankfleet.federated.contract.contexts import Member
from rankfleet.federated.contract.spec import Pair, Spec
from rankfleet.federated.contract.update import Update
from rankfleet.federated.errors import Refused
from rankfleet.federated.methods.unlearning.fused import Fused, mask
from tests.edge_agent.rig import adapter, rig
from tests.world import World, job

from .test_by_hand import client, server, step

MAPS = {f"l{n}.{side}": SimpleNamespace(layer=n) for n in range(3) for side in "qv"}
SPEC = Spec({m: Pair(p.layer, 3, 2, 1, 1.0, 3, 2, "v") for m, p in MAPS.items()}, {})


def trained(device: str, **lengths: float) -> Update:
    """One number of A moved in each map."""
    names = {k.replace("_", "."): n for k, n in lengths.items()}
    view = {f"{m}.A": np.zeros((1, 2), np.float32) for m in MAPS} | {
        f"{m}.B": np.zeros((3, 1), np.float32) for m in MAPS
    }
    return Update(
        device, 1.0, {f"{m}.A": np.array([[n, 0]], np.float32) for m, n in names.items()}, SPEC, view
    )


def test_critical_layers_moved_most_on_average_over_their_holders() -> None:
    # layer 0: (|-3| + 1) = 4 and 2, mean 3; layer 1: 2 and 3, mean 2.5; layer 2: 5 on one device, mean 5
    ctx = server()
    ctx.maps = MAPS
    ctx.updates = [trained("a", l0_q=-3, l0_v=1, l1_q=2), trained("b", l0_q=2, l1_q=3, l2_v=5)]
    m = Fused(layers=2)
    assert m.step({"l0.q.A": np.ones((1, 2))}, ctx) == {}
    assert ctx.state["critical"] == [0, 2]
    ask: Any = {"placement": dict.fromkeys(MAPS, 1), "rank": 1, "steps": 2, "lr": 0.1}
    assert set(m.plan(ask, "a", ctx)["placement"]) == {"l0.q", "l0.v", "l2.q", "l2.v"}
    assert m.plan({**ask, "placement": {"l1.q": 1}}, "a", ctx)["placement"] == {"l1.q": 1}
    assert m.plan(ask, "a", server()) == ask


def test_the_coordinator_moves_nothing_outside() -> None:
    ctx = server({"critical": [1]})
    ctx.maps = MAPS
    change = {
        "l0.q.A": np.ones((1, 2)),
        "l1.q.A": np.ones((4, 50)),
        "l1.q.B": np.ones((50, 4)),
        "head.bias": np.ones(2),
    }
    got = Fused(keep=0.3).step(change, ctx)
    assert got.keys() == {"l1.q.A", "l1.q.B"}
    for name, t in got.items():
        assert np.array_equal(t, mask(name, t.shape, 0.3))
        assert 0.2 < t.mean() < 0.4  # 200 draws at 0.3: three deviations


def test_the_mask_of_a_smaller_rank_is_a_part_of_a_larger_ones() -> None:
    assert np.array_equal(mask("m.A", (2, 9), 0.5), mask("m.A", (4, 9), 0.5)[:2])
    assert np.array_equal(mask("m.B", (9, 2), 0.5), mask("m.B", (9, 4), 0.5)[:, :2])
    assert not np.array_equal(mask("m.A", (4, 9), 0.5), mask("n.A", (4, 9), 0.5))
    assert mask("m.B", (9, 0), 0.5).shape == (9, 0)
    assert mask("m.A", (4, 9), 1.0).all()


def test_who_and_what_is_left_out() -> None:
    m = Fused(devices=("b",), label=1)
    assert [d.device for d in m.select([Member("a"), Member("b")], server())] == ["a"]
    examples = [{"label": 0}, {"label": 1}]
    assert m.data(examples, step()) == [{"label": 0}]
    assert Fused().data(examples, step()) == examples
    with pytest.raises(Refused, match="every example has label 1"):
        m.data([{"label": 1}], step())
    assert [m.trains(n, client()) for n in ("x.A", "x.B", "head.bias")] == [True, True, False]


def test_numbers_outside_stand_still_on_the_device(tiny: Path) -> None:
    spec, tensors = adapter(tiny)
    now = rig(tiny, {"f": Fused(keep=0.5)}, spec=spec, tensors=tensors).train()
    assert not any(k.startswith("head.") for k in now)
    for name, t in now.items():
        still = mask(name, t.shape, 0.5) == 0
        assert np.array_equal(t[still], tensors[name][still])
        assert (t[~still] != tensors[name][~still]).mean() > 0.9
    grads = {"m.A": torch.ones(2, 9)}
    assert np.array_equal(Fused(keep=0.5).grad(grads, {}, step())["m.A"].numpy(), mask("m.A", (2, 9), 0.5))


async def test_forgetting_lies_over_what_stays_frozen(tmp_path: Path, tiny: Path) -> None:
    base: dict[str, Any] = {
        "arms": {"ranks": [2], "bits": [32], "steps": [6], "batch": 8},
        "training": {"lr": 0.01, "evaluate": 16, "probe": 4},
        "rounds": 3,
    }  # fmt: skip
    async with World(tmp_path, tiny) as world:
        one = await world.run(job(**base))
        two = await world.run(
            job(name="forget", stack=[{"fused": {"devices": ["d2"]}}], start=one, frozen=True, **base)
        )
        home = world.coordinator.config.home / "jobs"
        old, first, last = (
            Registry(home / one).load(3),
            Registry(home / two).load(0),
            Registry(home / two).load(3),
        )
        rows = world.coordinator.ledger.rows(tables.assignments, job=two)
        assert {r["device"] for r in rows if r["round"] < 3} == {"d0", "d1"}
        # It begins as the old adapter was, to the rounding of factors that travel as fp16 in the first job.
        before = {r["device"]: database.read(r["telemetry"])["held"]["loss"] for r in rows if r["round"] == 0}
        then = world.coordinator.ledger.rows(tables.assignments, job=one, round=3)
        for r in then:
            if r["device"] in before:
                assert before[r["device"]] == pytest.approx(
                    database.read(r["telemetry"])["held"]["loss"], rel=2e-3
                )
        # One layer moved, within its mask; carry and heads are as they were: taking the pairs away undoes it.
        assert not any(np.any(p.B) for p in first.pairs.values())
        assert (
            len({int(m.split("layer.")[1].split(".")[0]) for m, p in last.pairs.items() if np.any(p.B)}) == 1
        )
        for m, p in last.pairs.items():
            assert not np.any(p.B[mask(f"{m}.B", p.B.shape, 0.5) == 0])
        assert first.carry.keys() == last.carry.keys() == {m for m, p in old.pairs.items() if np.any(p.B)}
        assert all(
            np.array_equal(t, pair)
            for m in first.carry
            for t, pair in zip(last.carry[m], first.carry[m], strict=True)
        )
        assert all(np.array_equal(t, old.dense[k]) for k, t in last.dense.items())
