"""The ledger in a real PostgreSQL: a whole job, both sides killed, and the database gone in the middle."""

import asyncio
import contextlib
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from rankfleet.coordinator.broker.child import free_port
from rankfleet.coordinator.store import tables
from rankfleet.coordinator.store.database import Store
from rankfleet.federated.errors import ConfigError

from .world import World, job

BIN = max(Path("/usr/lib/postgresql").glob("*/bin"), default=None)
pytestmark = pytest.mark.skipif(BIN is None, reason="no PostgreSQL server is installed")


class Postgres:
    """A cluster of our own; PostgreSQL does not run as root."""

    def __init__(self, home: Path) -> None:
        self.home, self.port = home, free_port()
        home.mkdir()
        self.user = ["runuser", "-u", "postgres", "--"] if os.geteuid() == 0 else []
        if self.user:
            # pytest's folders are closed to others, above ours too
            shutil.chown(home, "postgres")
            for folder in (*list(home.parents)[: len(home.parts) - 3],):
                folder.chmod(folder.stat().st_mode | 0o011)
        self.call("initdb", "-D", str(home / "data"), "-A", "trust", "-U", "fleet", "--no-sync")
        self.start()
        self.url = f"postgresql+psycopg://fleet@127.0.0.1:{self.port}/postgres"

    def call(self, program: str, *words: str) -> None:
        assert BIN is not None
        done = subprocess.run(
            [*self.user, str(BIN / program), *words], capture_output=True, text=True, check=False, cwd="/"
        )
        assert done.returncode == 0, done.stdout + done.stderr

    def start(self) -> None:
        options = f"-p {self.port} -k {self.home} -c listen_addresses=127.0.0.1"
        self.call(
            "pg_ctl",
            "-D",
            str(self.home / "data"),
            "-w",
            "-l",
            str(self.home / "log"),
            "-o",
            options,
            "start",
        )

    def stop(self) -> None:
        self.call("pg_ctl", "-D", str(self.home / "data"), "-m", "immediate", "-w", "stop")


@pytest.fixture
def postgres(tmp_path: Path) -> Iterator[Postgres]:
    made = Postgres(tmp_path / "pg")
    yield made
    with contextlib.suppress(AssertionError):
        made.stop()


def same(a: World, b: World) -> bool:
    """The same rounds, updates and versions, whatever database holds them."""

    def told(world: World) -> list[tuple[object, ...]]:
        ledger = world.coordinator.ledger
        # An update's own digest covers how long it took.
        rows = [
            (r["round"], r["device"], r["state"], r["arm"], r["folded"])
            for r in ledger.rows(tables.assignments)
        ]
        return [*rows, *((r["number"], r["state"], r["digest"]) for r in ledger.rows(tables.versions))]

    return told(a) == told(b)


async def test_a_job_whose_ledger_is_in_postgres_is_the_same_job(
    tmp_path: Path, tiny: Path, postgres: Postgres
) -> None:
    text = job(rounds=3, stack=["sparse"])
    there = World(tmp_path / "a", tiny)
    there.database = postgres.url
    async with there, World(tmp_path / "b", tiny) as here:
        name = there.coordinator.jobs.submit(text)
        await there.until(lambda: len(there.coordinator.ledger.rows(tables.versions, job=name)) >= 2)
        await there.kill_coordinator()
        await there.kill_agent("d1")
        await there.start_coordinator()
        await there.start_agent("d1")
        await there.until(lambda: there.job_state(name) == "finished")
        await here.run(text)
        assert there.digest(name) == here.digest(name)
        assert same(there, here)


async def test_a_database_that_goes_away_loses_nothing(
    tmp_path: Path, tiny: Path, postgres: Postgres, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rankfleet.coordinator.queue.RETRY_S", 0.3)
    world = World(tmp_path / "a", tiny)
    world.database = postgres.url
    async with world:
        name = world.coordinator.jobs.submit(job(rounds=5, stack=["sparse"]))
        await world.until(lambda: len(world.coordinator.ledger.rows(tables.versions, job=name)) >= 2)
        await asyncio.to_thread(postgres.stop)
        await asyncio.sleep(1.0)
        await asyncio.to_thread(postgres.start)
        await world.until(lambda: world.job_state(name) == "finished", 60)
        rows = world.coordinator.ledger.rows(tables.assignments, job=name)
        assert {r["state"] for r in rows if r["round"] < 5} == {"counted"}
        assert len(rows) == 18


def test_a_database_that_is_not_there_is_said(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="the ledger at postgresql"):
        Store("postgresql+psycopg://fleet:secret@127.0.0.1:1/postgres")
    with pytest.raises(ConfigError) as said:
        Store("postgresql+psycopg://fleet:secret@127.0.0.1:1/postgres")
    assert "secret" not in str(said.value)
    with pytest.raises(ConfigError, match="not understood"):
        Store("nonsense")
    with pytest.raises(ConfigError, match="pip install"):
        Store("postgresql+nodriver://x/y")
