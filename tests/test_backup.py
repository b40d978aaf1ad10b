"""A coordinator is put back to an older state on another host; its devices, which are ahead of it, go on
with it."""

import shutil
import tarfile
from pathlib import Path

import msgspec
import pytest

from rankfleet.coordinator.config import CoordinatorConfig
from rankfleet.coordinator.store import tables
from rankfleet.coordinator.store.backup import backup, restore
from rankfleet.edge_agent.trust import identity
from rankfleet.federated.errors import ConfigError

from .world import World, job


async def test_every_enrolment_survives_and_the_job_goes_on(tmp_path: Path, tiny: Path) -> None:
    text = job(rounds=5, stack=["sparse"])
    async with World(tmp_path / "a", tiny) as world:
        clean = [
            r["digest"] for r in world.coordinator.ledger.rows(tables.versions, job=await world.run(text))
        ]
    async with World(tmp_path / "b", tiny) as world:
        name = world.coordinator.jobs.submit(text)
        versions = lambda: len(world.coordinator.ledger.rows(tables.versions, job=name))  # noqa: E731
        await world.until(lambda: versions() >= 3)
        config, epoch = world.coordinator.config, world.coordinator.epoch
        said = backup(config, tmp_path / "fleet.tar.gz")
        assert said["files"] > 5
        assert (tmp_path / "fleet.tar.gz").stat().st_mode & 0o777 == 0o600
        await world.until(lambda: versions() >= 5)
        await world.kill_coordinator()
        (tmp_path / "b" / "coordinator").rename(tmp_path / "burnt")
        restore(config, tmp_path / "fleet.tar.gz")
        await world.start_coordinator()
        assert world.coordinator.epoch > epoch
        await world.until(lambda: world.job_state(name) == "finished")
        assert [r["digest"] for r in world.coordinator.ledger.rows(tables.versions, job=name)][:3] == clean[
            :3
        ]
        states = {
            r["state"] for r in world.coordinator.ledger.rows(tables.assignments, job=name) if r["round"] < 5
        }
        assert states == {"counted"}
        assert [d["state"] for d in world.coordinator.devices.table()] == ["enrolled"] * 3
        agent = world.agents["d0"][0]
        assert not agent.outbox.begin(epoch)  # what was said before the fire is not heard any more


async def test_a_device_that_joins_a_younger_fleet_hears_it(tmp_path: Path, tiny: Path) -> None:
    """The coordinator before was restored, far in the future; job names are the same. None of that may
    count any more."""
    async with World(tmp_path / "a", tiny, devices=1) as first:
        first.coordinator.epoch += 10**9
        assert await first.run(job(rounds=2)) == "toy-1"
        home = first.home / "d0"
    assert (home / "epoch").exists()
    async with World(tmp_path / "b", tiny, devices=1) as second:
        await second.kill_agent("d0")
        shutil.rmtree(second.home / "d0")
        shutil.copytree(home, second.home / "d0", symlinks=True)
        (second.home / "d0" / "roster.version").write_text("99")
        identity.enroll(second.coordinator.invite("d0"), second.home / "d0", again=True)
        await second.start_agent("d0")
        assert await second.run(job(rounds=2)) == "toy-1"
        assert not (second.home / "d0" / "roster.version").exists()


def test_what_is_not_taken(tmp_path: Path) -> None:
    config = CoordinatorConfig(data_dir=str(tmp_path / "c"))
    with pytest.raises(ConfigError, match="does not exist"):
        backup(config, tmp_path / "x.tar.gz")
    config.home.mkdir()
    (config.home / "coordinator.key").write_bytes(b"k" * 32)
    backup(config, tmp_path / "x.tar.gz")
    with pytest.raises(ConfigError, match="is not empty"):
        restore(config, tmp_path / "x.tar.gz")
    with pytest.raises(ConfigError, match="of fleet `main`"):
        restore(CoordinatorConfig(data_dir=str(tmp_path / "d"), fleet="other"), tmp_path / "x.tar.gz")
    (tmp_path / "y.tar.gz").write_bytes(b"rubbish")
    with pytest.raises(ConfigError, match="is it a file that"):
        restore(msgspec.structs.replace(config, data_dir=str(tmp_path / "d")), tmp_path / "y.tar.gz")


def test_a_hostile_archive_writes_nothing_elsewhere(tmp_path: Path) -> None:
    config = CoordinatorConfig(data_dir=str(tmp_path / "c"))
    config.home.mkdir()
    backup(config, tmp_path / "x.tar.gz")
    with tarfile.open(tmp_path / "x.tar.gz") as good, tarfile.open(tmp_path / "bad.tar.gz", "w:gz") as bad:
        for entry in good.getmembers():
            bad.addfile(entry, good.extractfile(entry))
        (tmp_path / "thing").write_text("owned")
        bad.add(tmp_path / "thing", "home/../../owned")
    with pytest.raises(ConfigError, match="no file of a data directory"):
        restore(CoordinatorConfig(data_dir=str(tmp_path / "d")), tmp_path / "bad.tar.gz")
    assert not (tmp_path / "owned").exists()
