"""Fleets that sleep, join late and lie about the time; disks that are full for a while."""

import asyncio
import errno
import random
import time
from pathlib import Path
from typing import Any

import pytest

import rankfleet.coordinator.exchange.receiving
import rankfleet.coordinator.fleet.enrolment
import rankfleet.coordinator.queue
import rankfleet.edge_agent.order
import rankfleet.federated.program.files
from rankfleet.coordinator.rounds.waiting import may_close
from rankfleet.coordinator.store import tables
from rankfleet.federated.contract.stack import Stack

from .world import World, job


def states(world: World, name: str, number: int) -> dict[str, str]:
    return {
        r["device"]: r["state"]
        for r in world.coordinator.ledger.rows(tables.assignments, job=name, round=number)
    }


async def test_a_job_waits_for_its_minimum_of_devices(tmp_path: Path, tiny: Path) -> None:
    async with World(tmp_path, tiny, devices=2) as world:
        await world.kill_agent("d1")
        world.coordinator.devices.leave("d1")
        name = world.coordinator.jobs.submit(job(rounds=1, min_devices=2))
        told = lambda: [e["text"] for e in world.coordinator.ledger.rows(tables.events, job=name)]  # noqa: E731
        await world.until(lambda: any("waiting for 2 devices, 1 are there" in t for t in told()))
        assert not world.coordinator.ledger.rows(tables.rounds, job=name)
        (tmp_path / "d1" / "identity.json").unlink()
        world.enrol("d1")
        await world.start_agent("d1")
        await world.until(lambda: world.job_state(name) == "finished", 30)
        assert states(world, name, 0) == {"d0": "counted", "d1": "counted"}


async def test_a_device_joins_in_mid_job(tmp_path: Path, tiny: Path) -> None:
    async with World(tmp_path, tiny, devices=3) as world:
        await world.kill_agent("d2")
        world.coordinator.devices.leave("d2")
        name = world.coordinator.jobs.submit(job(rounds=6, stack=["sparse"]))
        await world.until(lambda: len(world.coordinator.ledger.rows(tables.versions, job=name)) >= 2)
        (tmp_path / "d2" / "identity.json").unlink()
        world.enrol("d2")
        await world.start_agent("d2")
        await world.until(lambda: world.job_state(name) == "finished")
        assert "d2" not in states(world, name, 0)
        assert states(world, name, 5) == dict.fromkeys(world.names, "counted")


async def test_the_automatic_deadline_closes_without_a_sleeper(
    tmp_path: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Twice the predicted time and 30 s; here time runs 60 times as fast."""
    started = time.monotonic()
    async with World(tmp_path, tiny, devices=3) as world:
        asleep, _ = world.agents["d2"]

        async def never(*args: Any) -> None:
            await asyncio.sleep(3600)

        asleep._one = never  # type: ignore[assignment]
        name = world.coordinator.jobs.submit(job(rounds=2, deadline_s="auto", quorum=0.6))
        await world.until(lambda: world.coordinator.jobs.runner is not None)
        assert world.coordinator.jobs.runner
        world.coordinator.jobs.runner.ticks = lambda: started + 60 * (time.monotonic() - started)
        await world.until(lambda: world.job_state(name) == "finished", 60)
        assert states(world, name, 0)["d2"] in ("late", "assigned")
        assert states(world, name, 1)["d0"] == "counted"
        row = world.coordinator.ledger.row(tables.rounds, job=name, number=0)
        assert row is not None
        assert row["closed"] - row["opened"] < 20


class Run:
    """What `may_close` asks for."""

    def __init__(self, **changes: Any) -> None:
        from rankfleet.coordinator.jobs.spec import read_job

        self.plan = type("Plan", (), {"spec": read_job(job(**changes)), "stack": Stack({})})


@pytest.mark.parametrize(
    ("received", "out", "waited", "changes", "closes"),
    [
        (3, 0, 0, {}, True),
        (2, 1, 1e6, {"deadline_s": 0}, False),
        (2, 1, 9, {"deadline_s": 10, "quorum": 0.6}, False),
        (2, 1, 11, {"deadline_s": 10, "quorum": 0.6}, True),
        (2, 1, 11, {"deadline_s": 10, "quorum": 0.8}, False),
        (1, 2, 31, {"deadline_s": 10, "quorum": 0.8}, True),
        (0, 3, 1e6, {"deadline_s": 10, "quorum": 0.1}, False),
        (1, 3, 1e6, {"deadline_s": 10, "quorum": 0.1, "min_devices": 2}, False),
        (2, 1, 229, {"deadline_s": "auto", "quorum": 0.6}, False),
        (2, 1, 231, {"deadline_s": "auto", "quorum": 0.6}, True),
    ],
)
def test_when_a_round_may_close(
    received: int, out: int, waited: float, changes: dict[str, Any], closes: bool
) -> None:
    rows: Any = [{"state": "received"}] * received + [{"state": "assigned"}] * out
    assert may_close(Run(**changes), rows, {"expected_s": 100.0}, 0, waited) is closes  # type: ignore[arg-type]


async def test_a_clock_that_jumps_moves_nothing(
    tmp_path: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng, real = random.Random(0), time.time
    monkeypatch.setattr(
        time, "time", lambda: real() + rng.choice([-86_400 * 365, -3600, 0, 3600, 86_400 * 365])
    )
    monkeypatch.setattr(
        rankfleet.coordinator.fleet.enrolment, "DAY_S", 1e9
    )  # when a claim ends is the one thing that goes by the clock
    async with World(tmp_path, tiny) as world:
        name = world.coordinator.jobs.submit(job(rounds=4, deadline_s=20, quorum=0.5, stack=["sparse"]))
        await world.until(lambda: len(world.coordinator.ledger.rows(tables.versions, job=name)) >= 3)
        await world.kill_coordinator()
        await world.start_coordinator()
        await world.until(lambda: world.job_state(name) == "finished")
        rows = [r for r in world.coordinator.ledger.rows(tables.assignments, job=name) if r["round"] < 4]
    assert [r["state"] for r in rows] == ["counted"] * 12
    assert sum(r["seconds"] < 60 for r in rows) >= 9


def full(calls: list[int], real: Any, times: int) -> Any:
    """A function that finds the disk full for its first calls."""

    def write(*args: Any, **options: Any) -> Any:
        calls.append(1)
        if len(calls) <= times:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(*args, **options)

    return write


async def test_a_full_disk_at_the_coordinator_pushes_back(
    tmp_path: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []
    monkeypatch.setattr(
        rankfleet.coordinator.exchange.receiving,
        "_write",
        full(calls, rankfleet.coordinator.exchange.receiving._write, 5),
    )
    async with World(tmp_path, tiny, packet=50_000) as world:
        name = await world.run(job(rounds=2))
        assert states(world, name, 0) == states(world, name, 1) == dict.fromkeys(world.names, "counted")
        assert len(calls) > 5


async def test_a_job_waits_while_versions_cannot_be_written(
    tmp_path: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []
    monkeypatch.setattr(rankfleet.coordinator.queue, "RETRY_S", 0.2)
    monkeypatch.setattr(
        "rankfleet.coordinator.store.versions.write_folder",
        full(calls, rankfleet.federated.program.files.write_folder, 3),
    )
    async with World(tmp_path, tiny) as world:
        name = world.coordinator.jobs.submit(job(rounds=2, stack=["sparse"]))
        await world.until(lambda: "No space left on device" in world.coordinator.jobs.problem)
        assert world.job_state(name) == "running"
        await world.until(lambda: world.job_state(name) == "finished")
        assert states(world, name, 1) == dict.fromkeys(world.names, "counted")
        assert world.coordinator.jobs.problem == ""


async def test_a_full_disk_on_a_device_is_a_reported_failure(
    tmp_path: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []
    real = rankfleet.edge_agent.order.write_in_order

    def write(files: dict[Path, bytes]) -> None:
        return full(calls, real, 1)(files) if any("/d0/" in str(p) for p in files) else real(files)

    monkeypatch.setattr(rankfleet.edge_agent.order, "write_in_order", write)
    async with World(tmp_path, tiny) as world:
        name = await world.run(job(rounds=2))
        row = world.coordinator.ledger.row(tables.assignments, job=name, round=0, device="d0")
        assert row is not None
        assert row["state"] == "failed"
        assert "No space left on device" in row["reason"]
        assert states(world, name, 1) == dict.fromkeys(world.names, "counted")


async def test_an_update_that_is_damaged_on_disk_is_trained_again_at_once(tmp_path: Path, tiny: Path) -> None:
    async with World(tmp_path, tiny, devices=2) as world:
        agent, _ = world.agents["d1"]
        real, broken = agent.outbox.add, []

        def add(result: Path) -> None:
            if not broken:
                broken.append(result)
                update = rankfleet.edge_agent.order.update_file(result)
                update.write_bytes(update.read_bytes()[:-1] + b"?")
            real(result)

        agent.outbox.add = add  # type: ignore[method-assign]
        await world.run(job(rounds=2, stack=["sparse"]))
        assert broken
        assert agent.engine.runs == 4  # two rounds, one of them twice, and the installation
        assert states(world, "toy-1", 0) == {"d0": "counted", "d1": "counted"}
