"""A method that selects nobody or admits nothing is obeyed: nothing fails open."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from rankfleet.coordinator.export import load
from rankfleet.coordinator.store import tables
from rankfleet.federated.contract.contexts import Member, ServerContext
from rankfleet.federated.contract.method import Method
from rankfleet.federated.contract.update import Update

from ..foreign import register
from ..world import World, job


class Nobody(Method, frozen=True):
    """`admit`: drops everything in the second round."""

    def admit(self, updates: list[Update], ctx: ServerContext) -> list[Update]:
        return [] if ctx.round.number == 1 else updates


class AllButOne(Method, frozen=True):
    """`admit`: drops d0."""

    def admit(self, updates: list[Update], ctx: ServerContext) -> list[Update]:
        return [u for u in updates if u.device != "d0"]


class Twice(Method, frozen=True):
    """`admit`: counts everybody double."""

    def admit(self, updates: list[Update], ctx: ServerContext) -> list[Update]:
        return [*updates, *updates]


class Wary(Method, frozen=True):
    """`select`: nobody at first, then everybody."""

    def select(self, devices: Sequence[Member], ctx: ServerContext) -> Sequence[Member]:
        ctx.state["asked"] = ctx.state.get("asked", 0) + 1
        return devices if ctx.state["asked"] > 2 else []


class Stranger(Method, frozen=True):
    """`select`: a device that is not there."""

    def select(self, devices: Sequence[Member], ctx: ServerContext) -> Sequence[Member]:
        return [*devices, Member("mallory")]


def events(world: World, name: str) -> list[str]:
    return [e["text"] for e in world.coordinator.ledger.rows(tables.events, job=name)]


@pytest.mark.parametrize("space", ["product", "factors"])
async def test_a_round_without_an_admitted_update_keeps_the_old_version(
    tmp_path: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch, space: str
) -> None:
    register(monkeypatch, "nobody", Nobody)
    async with World(tmp_path, tiny, devices=2) as world:
        name = await world.run(job(rounds=3, stack=["nobody"], space=space))
        versions = [load(world.coordinator.config, name, n)[0] for n in range(4)]
        for pair, before in zip(versions[2].pairs.values(), versions[1].pairs.values(), strict=True):
            assert np.array_equal(pair.B @ pair.A, before.B @ before.A)
        assert np.array_equal(versions[2].dense["head.weight"], versions[1].dense["head.weight"])
        assert not np.array_equal(versions[3].dense["head.weight"], versions[2].dense["head.weight"])
        rows = world.coordinator.ledger.rows(tables.assignments, job=name, round=1)
        assert {(r["state"], r["reason"]) for r in rows} == {("dropped", "`nobody` did not admit it")}
        assert "round 1: no update was admitted; version 2 is what version 1 was" in events(world, name)


async def test_what_is_counted_is_what_was_admitted(
    tmp_path: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    register(monkeypatch, "all_but_one", AllButOne)
    async with World(tmp_path, tiny, devices=3) as world:
        name = await world.run(job(rounds=2, stack=["all_but_one"]))
        rows = world.coordinator.ledger.rows(tables.assignments, job=name, round=0)
        assert {r["device"]: r["state"] for r in rows} == {"d0": "dropped", "d1": "counted", "d2": "counted"}
        assert any("`all_but_one` did not admit its update of round 0" in e for e in events(world, name))


async def test_a_round_waits_while_nobody_is_selected(
    tmp_path: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    register(monkeypatch, "wary", Wary)
    async with World(tmp_path, tiny, devices=2) as world:
        monkeypatch.setattr("rankfleet.coordinator.rounds.opening.LOOK_S", 0.05)
        name = await world.run(job(rounds=2, stack=["wary"]))
        assert events(world, name).count("round 0 waits: `wary` selects none of 2 devices") == 1


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (Twice, "hook `admit`: admits an update that it was not given"),
        (Stranger, "hook `select`: selects `mallory`"),
    ],
)
async def test_a_method_that_invents_is_named(
    tmp_path: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch, kind: type[Method], reason: str
) -> None:
    register(monkeypatch, "culprit", kind)
    async with World(tmp_path, tiny, devices=2) as world:
        name = world.coordinator.jobs.submit(job(rounds=2, stack=["culprit"]))
        await world.until(lambda: world.job_state(name) == "failed")
        row = world.coordinator.ledger.row(tables.jobs, id=name)
        assert row is not None
        assert f"method `culprit`, {reason}" in row["reason"]
