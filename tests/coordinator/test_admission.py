"""A device that floods or sends rubbish is slowed down, then suspended; an honest one never notices."""

import os
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from rankfleet.coordinator.config import Limits
from rankfleet.coordinator.exchange.admission import FORGIVEN_S, SLOW_AT, SUSPEND_AT, Admission
from rankfleet.coordinator.store import tables
from rankfleet.edge_agent.trust import identity
from rankfleet.federated.transport.topics import Topics
from rankfleet.federated.wire.messages import Report, seal

from ..world import World, job


class Door:
    """An `Admission` under a clock of our own."""

    def __init__(self, **limits: float) -> None:
        self.now = 0.0
        self.suspended: list[tuple[str, str]] = []
        self.admission = Admission(
            Limits(**limits), lambda device, reason: self.suspended.append((device, reason)), lambda: self.now  # type: ignore[arg-type]
        )  # fmt: skip

    def say(self, count: int, device: str = "a") -> int:
        return sum(self.admission.take(device) for _ in range(count))


def test_a_burst_is_fine_and_the_bucket_fills_again() -> None:
    door = Door(messages_per_s=2.0, burst=10)
    assert door.say(10) == 10
    door.now += 2.0
    assert door.say(4) == 4
    assert door.say(1) == 0
    assert door.say(10, "b") == 10, "one device's flood is not another's"
    assert not door.admission.slowed("a")


def test_a_flood_is_slowed_then_suspended() -> None:
    door = Door(messages_per_s=1.0, burst=10)
    quiet = []
    while not door.suspended and door.now < 10_000:
        door.say(50)
        quiet.append(bool(door.admission.slowed("a")))
        door.now += 1.5
    assert door.suspended == [("a", "more than 1 messages a second")]
    assert quiet.index(True) == SLOW_AT - 1
    assert door.admission.dropped > 100


@given(st.lists(st.floats(0.1, 30.0), min_size=1, max_size=300))
def test_whoever_keeps_to_the_rate_is_always_read(pauses: list[float]) -> None:
    door = Door(messages_per_s=10.0, burst=10)
    for pause in pauses:
        door.now += pause
        assert door.say(1) == 1


def test_strikes_are_forgiven() -> None:
    door = Door()
    for _ in range(20 * SUSPEND_AT):
        door.admission.strike("a", "rubbish")
        door.now += FORGIVEN_S
    assert not door.suspended
    for _ in range(SUSPEND_AT):
        door.admission.strike("a", "rubbish")
    assert not door.suspended, "what comes at once is one strike"


async def test_a_flooding_device_is_suspended_and_the_round_goes_on(tmp_path: Path, tiny: Path) -> None:
    async with World(tmp_path, tiny, devices=3) as world:
        service, topic = world.coordinator, Topics("main").device("d2", "up")
        await world.kill_agent("d2")
        now = [0.0]
        service.admission._clock = lambda: now[0]
        name = service.jobs.submit(job(rounds=2, deadline_s=0))
        await world.until(
            lambda: len(service.ledger.rows(tables.assignments, job=name, state="received")) == 2
        )
        key = identity.load(tmp_path / "d2").link_key
        while service.devices.enrolled("d2"):
            for _ in range(400):
                service._take(topic, seal(Report(name, 0, "training"), "d2", key))
            now[0] += 100.0
            assert now[0] < 10_000
        await world.until(lambda: world.job_state(name) == "finished", 30)
        rows = {r["device"]: r for r in service.ledger.rows(tables.assignments, job=name, round=0)}
        assert rows["d2"]["state"] == "refused"
        assert "the device is suspended: more than 10 messages a second" in rows["d2"]["reason"]
        assert not service.ledger.rows(tables.assignments, job=name, device="d2", round=1)
        # It stays out over a restart, and comes back when an operator says so, without enrolling again.
        await world.kill_coordinator()
        await world.start_coordinator()
        agent = await world.start_agent("d2")
        await world.until(agent.bus.connected.is_set)
        assert world.coordinator.devices.suspended("d2")
        world.coordinator.resume("d2")
        again = await world.run(job(rounds=1))
        assert {
            r["device"] for r in world.coordinator.ledger.rows(tables.assignments, job=again, round=0)
        } == set(world.names)


async def test_rubbish_is_a_strike_and_changes_nothing_for_others(tmp_path: Path, tiny: Path) -> None:
    async with World(tmp_path, tiny, devices=2) as world:
        service, now = world.coordinator, [0.0]
        service.admission._clock = lambda: now[0]
        for _ in range(200):
            service._take(Topics("main").device("d1", "up"), os.urandom(100))
            service._chunk(Topics("main").device("d1", "chunk"), os.urandom(100))
            now[0] += 2.0
        assert service.devices.suspended("d1")
        await world.run(job(rounds=1))


async def test_a_device_that_was_only_invited_is_slowed_but_not_suspended(tmp_path: Path, tiny: Path) -> None:
    async with World(tmp_path, tiny, devices=1) as world:
        service, now = world.coordinator, [0.0]
        service.admission._clock = lambda: now[0]
        world.enrol("new")
        key = identity.load(tmp_path / "new").link_key
        for _ in range(40):
            for _ in range(400):
                service._take(
                    Topics("main").device("new", "up"), seal(Report("x", 0, "training"), "new", key)
                )
            now[0] += 700.0
        assert service.admission.dropped
        assert service.devices.key("new") == key
        assert not service.devices.suspended("new")
