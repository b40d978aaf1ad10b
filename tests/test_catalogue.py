"""The set, not the member: every method in the catalogue, killed on both sides in mid-run, and beside
awkward neighbours."""

import asyncio
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rankfleet.coordinator.store import tables
from rankfleet.coordinator.store.database import read
from rankfleet.federated.contract.catalogue import build_stack, entries, method_class, modules
from rankfleet.federated.contract.server_side import ServerSide
from rankfleet.federated.contract.stack import Stack
from rankfleet.federated.contract.update import Update
from rankfleet.federated.errors import Conflict
from rankfleet.federated.wire.frame import decode, freeze

from .world import World, job

NEIGHBOURS: list[list[Any]] = [
    ["ffa_lora"],
    [{"sparse": {"keep": 0.3}}],
    ["qsgd"],
    [{"sparse": {"keep": 0.3}}, "qsgd"],
    ["fedprox"],
    ["scaffold"],
    ["fedadam"],
    [{"fedbuff": {"size": 2}}],
    ["norm_bound"],
    [{"power_of_choice": {"cohort": 2}}],
    ["ditto"],
    ["fedit"],
]


def stack_of(*items: Any) -> list[Any] | None:
    """The stack, or None where its members exclude each other, which the stack's own tests cover."""
    names = [i if isinstance(i, str) else next(iter(i)) for i in items]
    if len(set(names)) < len(names):
        return None
    try:
        Stack(build_stack(list(items)))
    except Conflict:
        return None
    return list(items)


def text(stack: list[Any], **changes: Any) -> str:
    arms = {"ranks": [2], "bits": [32], "steps": [2], "batch": 4}
    return job(stack=stack, arms=arms, training={"lr": 0.01, "evaluate": 4, "probe": 2}, **changes)


def moved(world: World, name: str) -> bool:
    """Did the adapter change? Where no weight leaves a device, and there alone: what devices keep for
    themselves."""
    versions = world.coordinator.ledger.rows(tables.versions, job=name)
    if versions[0]["digest"] != versions[-1]["digest"]:
        return True
    stored = [p for p in (world.home / "coordinator" / "updates" / name).rglob("d?") if p.is_file()]
    assert stored
    weights = any(k.startswith("d/") for p in stored for k in decode(p.read_bytes())[0])
    reports = [
        read(r["telemetry"]) for r in world.coordinator.ledger.rows(tables.assignments, job=name, round=1)
    ]
    return not weights and all(r["personal"]["loss"] != r["held"]["loss"] for r in reports)


async def killed(world: World, name: str) -> None:
    """Both sides go in the middle of every round, and come back from disk."""
    for number in range(3):
        await world.until(
            lambda n=number: any(  # type: ignore[misc]
                r["state"] in ("received", "counted")
                for r in world.coordinator.ledger.rows(tables.assignments, job=name, round=n)
            )
        )
        for d in world.names:
            await world.kill_agent(d)
        await world.kill_coordinator()
        await world.start_coordinator()
        for d in world.names:
            await world.start_agent(d)
    await world.until(lambda: world.job_state(name) in ("finished", "failed"))


@pytest.mark.parametrize("name", sorted(modules()))
async def test_kill_both_sides_gives_the_same_bits(tmp_path: Path, tiny: Path, name: str) -> None:
    # Who arrives first must not decide what is compared, so buffers wait for everybody.
    kind = method_class(name)
    stack = [{name: {**kind.example, **({"size": 3} if name == "fedbuff" else {})}}]
    async with World(tmp_path / "a", tiny) as world:
        clean = world.digest(await world.run(text(stack)))
    async with World(tmp_path / "b", tiny) as world:
        job_name = world.coordinator.jobs.submit(text(stack))
        await killed(world, job_name)
        row = world.coordinator.ledger.row(tables.jobs, id=job_name)
        assert row is not None
        assert row["state"] == "finished", row["reason"]
        assert (kind.timed and name != "fedbuff") or world.digest(job_name) == clean


@pytest.mark.parametrize("name", sorted(modules()))
async def test_beside_awkward_neighbours(tmp_path: Path, tiny: Path, name: str) -> None:
    own = {name: dict(method_class(name).example)}
    async with World(tmp_path, tiny) as world:
        for neighbour in NEIGHBOURS:
            for items in ([own, *neighbour], [*neighbour, own]):
                stack = stack_of(*items)
                if stack is None:
                    continue
                done = await world.run(text(stack, rounds=2))
                refused = [
                    r["reason"]
                    for r in world.coordinator.ledger.rows(tables.assignments, job=done)
                    if r["state"] in ("refused", "failed")
                ]
                assert not refused, (stack, refused)
                assert moved(world, done), f"{stack} moved nothing"
                await asyncio.sleep(0)


@pytest.mark.parametrize("name", [e.name for e in entries() if "receive" in e.hooks])
async def test_decoding_again_gives_the_same_and_changes_nothing(
    name: str, tmp_path: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The engine decodes an update as often as its memory makes it."""
    real, times = ServerSide.receive, [0]

    def twice(self: ServerSide, update: Update, number: int) -> Update:
        first, once = real(self, update, number), freeze(self.state)
        second = real(self, update, number)
        assert freeze(self.state) == once
        assert first.delta.keys() == second.delta.keys()
        assert all(np.array_equal(t, second.delta[k]) for k, t in first.delta.items())
        times[0] += 1
        return second

    monkeypatch.setattr(ServerSide, "receive", twice)
    async with World(tmp_path, tiny, devices=2) as world:
        await world.run(job(rounds=2, stack=[name]))
    assert times[0] >= 4
