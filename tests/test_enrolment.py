"""Who gets in, over real brokers with mutual TLS: enrolment, per-device rules, revocation, renewal; and
who does not."""

import asyncio
import stat
import time
from pathlib import Path
from typing import Any

import msgspec
import pytest

from rankfleet.coordinator.broker.child import mosquitto
from rankfleet.coordinator.config import Enrolment
from rankfleet.coordinator.fleet.authority import Authority, own_names
from rankfleet.coordinator.store import tables
from rankfleet.edge_agent.trust import certificate, identity
from rankfleet.edge_agent.trust.certificate import Facts
from rankfleet.federated.errors import ConfigError, Refused, Unreachable, WireError
from rankfleet.federated.transport.address import tls_context
from rankfleet.federated.transport.topics import Topics
from rankfleet.federated.trust.claim import read_claim, write_claim
from rankfleet.federated.wire.messages import Leave, seal

from .secure import SecureWorld
from .world import job

KINDS = [
    "amqtt",
    pytest.param(
        "mosquitto", marks=pytest.mark.skipif(mosquitto() is None, reason="Mosquitto is not installed")
    ),
]
TOPICS = Topics("main")


@pytest.mark.parametrize("kind", KINDS)
async def test_a_job_over_mutual_tls(tmp_path: Path, tiny: Path, kind: str) -> None:
    async with SecureWorld(tmp_path, tiny, kind) as world:
        await world.run(job(rounds=2, stack=["sparse"]))
        private = [
            p
            for name in ("d0", "coordinator")
            for p in (tmp_path / name).rglob("*")
            if p.suffix in (".key", ".pem")
        ]
        secret = [p for p in private if b"PRIVATE KEY" in p.read_bytes()]
        assert {p.name for p in secret} >= {"device.pem", "ca.key", "server.key", "coordinator.key"}
        secret += [
            tmp_path / "d0" / "device.key",
            tmp_path / "d0" / "identity.json",
            tmp_path / "coordinator" / "coordinator.key",
        ]
        assert {stat.S_IMODE(p.stat().st_mode) for p in secret} == {0o600}


@pytest.mark.parametrize("kind", KINDS)
async def test_a_device_can_neither_speak_nor_listen_for_another(
    tmp_path: Path, tiny: Path, kind: str
) -> None:
    async with SecureWorld(tmp_path, tiny, kind) as world:
        evil = world.stranger(certificate.context(tmp_path / "d0") or pytest.fail("no certificate"))
        heard: list[str] = []
        for pattern in ("rf/main/dev/d1/down", "rf/main/dev/d1/job", "rf/main/dev/+/up", "#"):
            await evil.subscribe(pattern, lambda topic, payload: heard.append(topic))
        await evil.start()
        await world.until(evil.connected.is_set)
        # Even with the other's link key in hand, the broker does not take it.
        key = identity.load(tmp_path / "d1").link_key
        for topic in (
            TOPICS.device("d1", "up"),
            TOPICS.device("d1", "job"),
            TOPICS.device("d1", "down"),
            TOPICS.blob("00"),
        ):
            task = asyncio.create_task(evil.publish(topic, seal(Leave(), "d1", key)))
            await asyncio.wait([task], timeout=0.5)
            task.cancel()
        await world.run(job(rounds=1))
        assert world.coordinator.devices.enrolled("d1")
        assert not [t for t in heard if "/d1/" in t or t.endswith("/up")]
        await evil.stop()


def self_signed(folder: Path, name: str) -> Any:
    """A certificate for `name` of an authority that somebody made."""
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    other = Authority(folder, "main")
    cert, key = other.client()
    assert isinstance(serialization.load_pem_private_key(key.read_bytes(), None), ec.EllipticCurvePrivateKey)
    return cert, key


@pytest.mark.parametrize("kind", KINDS)
async def test_without_a_certificate_of_the_fleet_nobody_connects(
    tmp_path: Path, tiny: Path, kind: str
) -> None:
    async with SecureWorld(tmp_path, tiny, kind, devices=1) as world:
        ca = str(world.authority.ca)
        (tmp_path / "evil").mkdir()
        cert, key = self_signed(tmp_path / "evil", "coordinator")
        buses = [
            world.stranger(tls_context(ca), "none"),
            world.stranger(tls_context(ca, str(cert), str(key)), "foreign"),
        ]
        server, server_key = world.authority.server([])
        buses.append(
            world.stranger(tls_context(ca, str(server), str(server_key)), "server")
        )  # a server's certificate is no client's
        for bus in buses:
            await bus.start()
        await asyncio.sleep(2.0)
        assert not [b.client_id for b in buses if b.connected.is_set()]
        for bus in buses:
            await bus.stop()


@pytest.mark.parametrize("kind", KINDS)
async def test_a_revoked_device_is_cut_off_and_the_job_goes_on(tmp_path: Path, tiny: Path, kind: str) -> None:
    async with SecureWorld(tmp_path, tiny, kind) as world:
        agent, _ = world.agents["d1"]
        old = certificate.context(tmp_path / "d1")

        def sleeps(order: Any) -> None:
            time.sleep(0.3)

        agent.engine.before = sleeps  # type: ignore[attr-defined]
        name = world.coordinator.jobs.submit(job(rounds=4))
        await world.until(lambda: len(world.coordinator.ledger.rows(tables.versions, job=name)) >= 2)
        world.coordinator.revoke("d1")
        await world.until(lambda: world.job_state(name) == "finished", 60)
        assert not agent.bus.connected.is_set()
        last = world.coordinator.ledger.rows(tables.assignments, job=name, round=3)
        assert [r["device"] for r in last] == ["d0"]
        again = world.stranger(old or pytest.fail("no certificate"), "d1-again")
        await again.start()
        await asyncio.sleep(1.5)
        assert not again.connected.is_set()
        await again.stop()
        with pytest.raises(ConfigError, match="no device `d1` is invited"):
            world.coordinator.revoke("d1")
        # A new claim lets it in again, with what it has on its disk.
        await world.kill_agent("d1")
        await world.enrolled(world.coordinator.invite("d1"), "d1", again=True)
        await world.start_agent("d1")
        await world.until(lambda: world.coordinator.devices.enrolled("d1"))


async def test_claims(tmp_path: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with SecureWorld(tmp_path, tiny, "auto", devices=0) as world:
        token = world.coordinator.invite("a")
        claim = read_claim(token)
        assert claim.door.startswith("https://")
        # An answer that was lost: the same device asks again with the same key, and gets it.
        monkeypatch.setattr(
            certificate,
            "write_atomic",
            lambda *a, **k: (_ for _ in ()).throw(OSError(28, "No space left on device")),
        )
        with pytest.raises(ConfigError, match="No space left"):
            await world.enrolled(token, "a")
        monkeypatch.undo()
        assert not (tmp_path / "a" / "identity.json").exists()
        await world.enrolled(token, "a")
        with pytest.raises(Refused, match="was used by another device"):
            await world.enrolled(token, "thief")
        with pytest.raises(ConfigError, match="is enrolled as `a`"):
            await world.enrolled(token, "a")
        with pytest.raises(WireError, match="another key than the claim token names"):
            await world.enrolled(write_claim(msgspec.structs.replace(claim, pin=b"x" * 32)), "b")
        with pytest.raises(Refused, match="no claim of this device"):
            await world.enrolled(write_claim(msgspec.structs.replace(claim, secret=b"guess")), "b")
        with pytest.raises(Unreachable, match="does not answer"):
            await world.enrolled(write_claim(msgspec.structs.replace(claim, door="https://127.0.0.1:1")), "b")
        late = world.coordinator.invite("late")
        world.coordinator.ledger.change(tables.claims, {"device": "late"}, expires=time.time() - 1)
        with pytest.raises(Refused, match="older than 7 days"):
            await world.enrolled(late, "late")
        newer = world.coordinator.invite("late")
        with pytest.raises(Refused, match="no claim of this device"):
            await world.enrolled(late, "late")
        await world.enrolled(newer, "late")
        with pytest.raises(ConfigError, match="no device can be called `coordinator`"):
            world.coordinator.invite("coordinator")
        assert world.coordinator.enrolment.refused == 4


async def test_an_old_claim_is_void_without_certificates_too(tmp_path: Path, tiny: Path) -> None:
    from .world import World

    async with World(tmp_path, tiny, devices=0) as world:
        world.names = ["slow"]
        world.enrol("slow")
        world.data["slow"] = tmp_path / "none.jsonl"
        world.coordinator.ledger.change(tables.claims, {"device": "slow"}, expires=1.0)
        agent = await world.start_agent("slow")
        await world.until(lambda: "older than 7 days" in str(agent.status.get("last_error")))
        assert not world.coordinator.devices.enrolled("slow")


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"{}", "not a certificate request"),
        (b"\xff" * 99, "not a certificate request"),
        (b"x" * 20_000, "at most 16,384"),
    ],
)
async def test_rubbish_at_the_door(tmp_path: Path, tiny: Path, body: bytes, message: str) -> None:
    async with SecureWorld(tmp_path, tiny, "auto", devices=0) as world:
        url, pin = world.coordinator.models.url, world.coordinator.models.public_pin
        with pytest.raises((Refused, Unreachable)) as said:
            await asyncio.to_thread(certificate._post, url, pin, body)
        assert message in str(said.value) or "413" in str(said.value)
        assert world.coordinator.models.url


async def test_a_certificate_is_renewed_before_it_ends(
    tmp_path: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(certificate, "CLOCK_S", 0.1)
    async with SecureWorld(
        tmp_path, tiny, "auto", devices=1, enrolment=Enrolment(certificate_days=1 / 24)
    ) as world:
        await world.kill_agent("d0")
        first = certificate.facts(tmp_path / "d0")
        assert first
        path = tmp_path / "d0" / "tls" / "facts.json"
        path.write_bytes(msgspec.json.encode(msgspec.structs.replace(first, ends=time.time() + 10)))
        old = (tmp_path / "d0" / "tls" / "device.pem").read_bytes()
        agent = await world.start_agent("d0")
        await world.until(lambda: (tmp_path / "d0" / "tls" / "device.pem").read_bytes() != old, 30)
        await world.until(
            lambda: (f := certificate.facts(tmp_path / "d0")) is not None and f.ends > time.time() + 1800
        )
        await world.until(agent.bus.connected.is_set)
        assert len(world.coordinator.ledger.rows(tables.certificates, device="d0")) == 2
        await world.child_restart()
        await world.until(agent.bus.connected.is_set, 30)


async def test_a_renewal_that_fails_is_said_and_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from types import SimpleNamespace

    from rankfleet.edge_agent.status import Status

    monkeypatch.setattr(certificate, "RETRY_S", 0.05)
    folder = tmp_path / "tls"
    folder.mkdir()
    (folder / "facts.json").write_bytes(
        msgspec.json.encode(Facts("https://127.0.0.1:1", b"", 0.0, time.time() + 60))
    )
    started: list[int] = []
    bus: Any = SimpleNamespace(
        start=lambda: asyncio.sleep(0, started.append(1)), connected=asyncio.Event(), sent=0, received=0
    )
    status = Status(tmp_path, bus)
    task = asyncio.create_task(certificate.keep(tmp_path, bus, status))
    while "cannot be renewed" not in str(status.get("last_error")):
        await asyncio.sleep(0.05)
    assert "not enrolled" in str(status["last_error"])
    assert started
    task.cancel()


async def test_a_device_without_a_clock_waits_for_the_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from types import SimpleNamespace

    from rankfleet.edge_agent.status import Status

    monkeypatch.setattr(certificate, "CLOCK_S", 0.05)
    (tmp_path / "tls").mkdir()
    now = time.time()
    (tmp_path / "tls" / "facts.json").write_bytes(
        msgspec.json.encode(Facts("https://x", b"", now + 0.5, now + 9e6))
    )
    started: list[float] = []
    bus: Any = SimpleNamespace(
        start=lambda: asyncio.sleep(0, started.append(time.time())),
        connected=asyncio.Event(),
        sent=0,
        received=0,
    )
    status = Status(tmp_path, bus)
    task = asyncio.create_task(certificate.keep(tmp_path, bus, status))
    await asyncio.sleep(0.2)
    assert status["state"] == "waiting for the time"
    assert not started
    while not started:
        await asyncio.sleep(0.05)
    assert started[0] >= now + 0.5
    assert status["state"] == "connecting"
    task.cancel()


async def test_a_message_that_is_heard_again_does_nothing(tmp_path: Path, tiny: Path) -> None:
    from rankfleet.federated.wire.messages import Report

    from .world import World

    async with World(tmp_path, tiny, devices=1) as world:
        who = identity.load(tmp_path / "d0")
        raw = seal(Report("none", 0, "training"), "d0", who.link_key)
        for _ in range(3):
            world.coordinator._take(TOPICS.device("d0", "up"), raw)
        assert world.coordinator.repeated == 2
        # Clocks of some systems tick every 16 ms: another message with the same number is another message.
        first, second = (seal(Report("none", n, "training"), "d0", who.link_key, number=7) for n in (1, 2))
        for other in (first, second):
            world.coordinator._take(TOPICS.device("d0", "up"), other)
        assert world.coordinator.repeated == 2
        assert world.coordinator.live["d0"]["round"] == 2
        world.coordinator._take(TOPICS.device("d0", "up"), raw[:-20] + b"x" * 20)
        world.coordinator._take(TOPICS.device("d1", "up"), raw)
        assert world.coordinator.dropped == 2


async def test_an_old_assignment_that_is_heard_again_is_not_carried_out(tmp_path: Path, tiny: Path) -> None:
    from rankfleet.federated.wire.messages import Report

    from .world import World

    async with World(tmp_path, tiny, devices=1) as world:
        topic = TOPICS.device("d0", "job")
        kept: list[bytes] = []
        listener = world.bus("evil")
        await listener.subscribe(topic, lambda t, payload: kept.append(payload))
        await listener.start()
        name = world.coordinator.jobs.submit(job(rounds=30))
        await world.until(lambda: len(world.coordinator.ledger.rows(tables.versions, job=name)) >= 4)
        agent, _ = world.agents["d0"]
        said: list[Any] = []
        say = agent.say

        async def heard(message: Any) -> None:
            said.append(message)
            await say(message)

        agent.say = heard  # type: ignore[method-assign]
        for _ in range(5):
            done = len(world.coordinator.ledger.rows(tables.versions, job=name))
            agent._take(topic, kept[0])
            await world.until(lambda: len(world.coordinator.ledger.rows(tables.versions, job=name)) > done)  # noqa: B023 - at once
        refused = [m for m in said if isinstance(m, Report) and m.state == "failed"]
        assert len(refused) == 5
        assert all(m.round == 0 and "a later round was done here" in m.reason for m in refused)
        assert not (tmp_path / "d0" / "jobs" / name / "r000000.update").exists()
        states = {
            r["state"]
            for r in world.coordinator.ledger.rows(tables.assignments, job=name)
            if r["round"] < done
        }
        assert states == {"counted"}, "the rounds that were being done went on"
        world.coordinator.jobs.cancel(name)


@pytest.mark.parametrize(
    ("begins", "ends", "state", "text"),
    [
        (-80, 10, "warning", "is not renewed"),
        (-1, 89, "ok", "renewed in time"),
        (-91, -1, "error", "it ended on"),
        (1, 91, "error", "clock says"),
    ],
)
def test_the_doctor_looks_at_the_certificate(begins: float, ends: float, state: str, text: str) -> None:
    from rankfleet.edge_agent.doctor import _certificate

    now, day = time.time(), 86_400
    found = _certificate(Facts("https://c.example", b"", now + begins * day, now + ends * day))
    assert found["state"] == state
    assert text in found["text"]


async def test_the_coordinators_own_certificates_are_renewed_while_it_runs(
    tmp_path: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import rankfleet.coordinator.fleet.authority
    from rankfleet.coordinator.fleet import renewal

    async with SecureWorld(tmp_path, tiny, "auto", devices=1) as world:
        service, bus = world.coordinator, world.coordinator.bus
        folder, pin, public = world.authority.folder, service.models.pin, service.models.public_pin
        old = (folder / "server.pem").read_bytes(), (folder / "coordinator.pem").read_bytes()
        changes: list[int] = []
        renewal.renew(world.authority, own_names(), bus.tls, lambda: changes.append(1))  # type: ignore[attr-defined]
        assert not changes, "nothing is due"
        monkeypatch.setattr(rankfleet.coordinator.fleet.authority, "_old", lambda cert: True)

        long = service.jobs.submit(job(rounds=500))
        await world.until(lambda: service.jobs.runner is not None)

        def changed() -> None:
            service.models.reload()
            service.jobs.source_changed()
            world.child.cut()

        renewal.renew(world.authority, own_names(), bus.tls, changed)  # type: ignore[attr-defined]
        assert (folder / "server.pem").read_bytes() != old[0]
        assert (folder / "coordinator.pem").read_bytes() != old[1]
        assert service.models.pin != pin
        assert service.jobs.runner
        assert service.jobs.runner.planner.source
        assert service.jobs.runner.planner.source.pin == service.models.pin
        service.jobs.cancel(long)
        monkeypatch.undo()
        await world.until(lambda: not bus.connected.is_set())
        await world.run(job(rounds=1))
        assert service.models.public_pin == public
        world.data["later"] = world.data["d0"]
        await world.join("later")
        await world.until(lambda: service.devices.enrolled("later"))


async def test_certificates_are_not_made_without_end(
    tmp_path: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rankfleet.coordinator.fleet.enrolment.MOST_A_DAY", 3)
    async with SecureWorld(tmp_path, tiny, "auto", devices=0) as world:
        token = world.coordinator.invite("a")
        await world.enrolled(token, "a")
        renew = [
            certificate.obtain,
            tmp_path / "a",
            "a",
            identity.load(tmp_path / "a").link_key,
            identity.signer(tmp_path / "a"),
        ]
        known = certificate.facts(tmp_path / "a")
        assert known
        for _ in range(2):
            await asyncio.to_thread(*renew, known.door, known.pin)  # type: ignore[arg-type]
        with pytest.raises(Refused, match="3 certificates were made for this device within a day"):
            await asyncio.to_thread(*renew, known.door, known.pin)  # type: ignore[arg-type]
        world.coordinator.ledger.change(tables.certificates, {"device": "a"}, ends=1.0, begins=0.0)
        await asyncio.to_thread(*renew, known.door, known.pin)  # type: ignore[arg-type]
        assert len(world.coordinator.ledger.rows(tables.certificates, device="a")) == 1


async def test_a_new_invitation_ends_what_the_device_was_doing(tmp_path: Path, tiny: Path) -> None:
    from .world import World

    async with World(tmp_path, tiny, devices=2) as world:
        await world.kill_agent("d1")
        name = world.coordinator.jobs.submit(job(rounds=1))
        await world.until(
            lambda: len(world.coordinator.ledger.rows(tables.assignments, job=name, state="received")) == 1
        )
        world.coordinator.invite("d1")
        await world.until(lambda: world.job_state(name) == "finished", 20)
        rows = world.coordinator.ledger.rows(tables.assignments, job=name, round=0)
        assert {r["device"]: (r["state"], r["reason"]) for r in rows}["d1"] == ("refused", "the device left")
