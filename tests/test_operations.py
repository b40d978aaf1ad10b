"""What operators do in the life of a fleet: canaries, bundles from devices, older ledgers, a disk that
fills up."""

import json
import logging
import shutil
import sqlite3
from pathlib import Path
from typing import Any

import pytest

import rankfleet.coordinator.exchange.uploads
from rankfleet.coordinator.config import CoordinatorConfig
from rankfleet.coordinator.store import database, tables
from rankfleet.edge_agent.config import Allow
from rankfleet.edge_agent.worker import worker
from rankfleet.federated.errors import ConfigError, Unreachable

from .world import World, job


def installed(world: World, name: str, number: int) -> set[str]:
    return {r["device"] for r in world.coordinator.ledger.rows(tables.assignments, job=name, round=number)}


async def test_a_good_version_goes_to_the_canaries_and_then_to_all(tmp_path: Path, tiny: Path) -> None:
    async with World(tmp_path, tiny, devices=3) as world:
        name = world.coordinator.jobs.submit(job(rounds=1, canary=0.34))
        await world.until(lambda: bool(installed(world, name, 1)))
        assert len(installed(world, name, 1)) == 1
        await world.until(lambda: world.job_state(name) == "finished")
        assert installed(world, name, 1) == {"d0", "d1", "d2"}


async def test_a_bad_version_stays_with_the_canaries(
    tmp_path: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = worker.LocalRound.evaluate

    def worse(self: Any, held: Any) -> None:
        real(self, held)
        if self.job.purpose == "install":
            self.told["held"]["loss"] += 50.0 * self.told["held"]["count"]

    monkeypatch.setattr(worker.LocalRound, "evaluate", worse)
    async with World(tmp_path, tiny, devices=3) as world:
        name = await world.run(job(rounds=2, canary=0.1))
        assert len(installed(world, name, 2)) == 1
        told = [e["text"] for e in world.coordinator.ledger.rows(tables.events, job=name)]
        assert any("worse on the canaries; 2 devices keep what they have" in t for t in told)
        assert world.coordinator.ledger.rows(tables.versions, job=name)[-1]["state"] == "candidate"


async def test_a_restart_in_between_canaries_and_the_rest(tmp_path: Path, tiny: Path) -> None:
    async with World(tmp_path, tiny, devices=3) as world:
        name = world.coordinator.jobs.submit(job(rounds=1, canary=0.34))
        await world.until(lambda: bool(installed(world, name, 1)))
        await world.kill_coordinator()
        await world.start_coordinator()
        await world.until(lambda: world.job_state(name) == "finished")
        assert installed(world, name, 1) == {"d0", "d1", "d2"}


async def test_logs_and_doctor_from_afar(tmp_path: Path, tiny: Path) -> None:
    world = World(tmp_path, tiny, devices=2)
    world.agent_changes = {"d1": {"allow": Allow(support=False)}}
    async with world:
        support = world.coordinator.support
        agent = world.agents["d0"][0]
        agent.config_path = tmp_path / "none.yaml"
        logging.getLogger("rankfleet.edge_agent.service").warning("the token is rf1.abcdefghijkl")
        said = await support.ask("d0", "logs")
        assert "the token is (secret)" in said
        assert json.loads(await support.ask("d0", "doctor"))[0]["check"] == "config"
        assert "does not allow it" in await support.ask("d1", "logs")
        with pytest.raises(ConfigError, match="not enrolled"):
            await support.ask("nobody", "logs")
        await world.kill_agent("d0")
        with pytest.raises(Unreachable, match="does not answer"):
            await support.ask("d0", "logs", 0.3)
        assert support._open == {}


def test_an_older_ledger_gets_what_it_lacks_and_a_newer_one_is_left_alone(tmp_path: Path) -> None:
    config = CoordinatorConfig(data_dir=str(tmp_path))
    with sqlite3.connect(tmp_path / "ledger.db") as old:
        old.execute(
            "create table devices (id varchar(64) primary key, link_key blob, public_key blob, state "
            "varchar(16), hello text)"
        )
        old.execute("insert into devices values ('d0', x'01', x'02', 'enrolled', '{}')")
    old.close()
    ledger = database.Store(database.url_of(config))
    row = ledger.row(tables.devices, id="d0")
    assert row is not None
    assert (row["state"], row["bytes_in"], row["note"]) == ("enrolled", 0, "")
    ledger.put(tables.facts, {"name": "schema"}, value=str(tables.SCHEMA + 1))
    ledger.close()
    with pytest.raises(ConfigError, match=f"this version knows {tables.SCHEMA}"):
        database.Store(database.url_of(config))


async def test_a_job_that_lacks_nothing_is_queued_after_a_kill(tmp_path: Path, tiny: Path) -> None:
    async with World(tmp_path, tiny, devices=1) as world:
        await world.kill_coordinator()
        with sqlite3.connect(tmp_path / "coordinator" / "ledger.db") as ledger:
            ledger.execute(
                "insert into jobs (id, text, state, created, number, reason) values ('toy-1', ?, 'held', 0, "
                "1, '')",
                (job(rounds=1),),
            )
        ledger.close()
        await world.start_coordinator()
        await world.until(lambda: world.job_state("toy-1") == "finished")


@pytest.mark.parametrize("packet", [400, 50_000])
async def test_with_little_room_left_devices_keep_their_updates(
    tmp_path: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch, packet: int
) -> None:
    free = [1e6]
    real = shutil.disk_usage
    monkeypatch.setattr(
        rankfleet.coordinator.exchange.uploads.shutil,
        "disk_usage",
        lambda path: real(path)._replace(free=free[0]),
    )
    async with World(tmp_path, tiny, devices=2, packet=packet) as world:
        name = world.coordinator.jobs.submit(job(rounds=1))
        await world.until(lambda: all(a.outbox.due() for a, _ in world.agents.values()))
        assert {r["state"] for r in world.coordinator.ledger.rows(tables.assignments, job=name)} == {
            "assigned"
        }
        free[0] = 1e12
        await world.until(lambda: world.job_state(name) == "finished")


async def test_raw_updates_go_when_a_job_ends_well_and_stay_otherwise(
    tmp_path: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with World(tmp_path, tiny, devices=2) as world:
        folder = tmp_path / "coordinator" / "updates"
        good = await world.run(job(rounds=2))
        assert not (folder / good).exists()
        monkeypatch.setattr(
            "rankfleet.coordinator.rounds.verdict.is_good", lambda run, number, metrics: False
        )
        doubtful = await world.run(job(rounds=6))
        assert sorted(p.name for p in (folder / doubtful).iterdir()) == [f"r{n:06d}" for n in range(6)]
        rows = world.coordinator.ledger.rows(tables.assignments, job=good)
        assert all(len(r["digest"]) == 64 for r in rows)
