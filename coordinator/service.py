"""`coordinator serve`: hears devices, runs jobs one after the other, answers the CLI. Nothing that arrives
can end it."""

import asyncio
import logging
import secrets
import time
from collections.abc import Callable
from typing import Any

import msgspec

from rankfleet.coordinator.jobs.plan import Plan
from rankfleet.federated.errors import ConfigError, WireError
from rankfleet.federated.transport.bus import Bus
from rankfleet.federated.transport.topics import Topics, checked, device_of
from rankfleet.federated.trust.claim import Claim, link_key, write_claim
from rankfleet.federated.wire.messages import (
    Assignment,
    Bundle,
    Done,
    Hello,
    Leave,
    Message,
    Offer,
    Report,
    Sorry,
    Up,
    Want,
    Welcome,
    body,
    open_up,
    seal,
    unpack,
)

from .config import CoordinatorConfig
from .exchange.admission import Admission
from .exchange.downloads import Blobs
from .exchange.https_server import HttpsServer
from .exchange.pending import Pending
from .exchange.receiving import Receiving
from .exchange.support import Support
from .fleet.authority import COORDINATOR, Authority
from .fleet.devices import Devices
from .fleet.enrolment import Enrolment
from .fleet.keys import Keys
from .operators.roster_in_force import Operators
from .queue import Jobs
from .store import database
from .store.ledger import Ledger

log = logging.getLogger(__name__)
FLUSH_S = 5.0


class Service:
    """One fleet. `start` returns when everything runs; `stop` ends it."""

    def __init__(
        self,
        config: CoordinatorConfig,
        bus: Bus,
        broker_url: str,
        authority: Authority | None = None,
        cut: Callable[[], None] | None = None,
    ) -> None:
        self.config, self.bus, self.broker_url = config, bus, broker_url
        home = config.home
        home.mkdir(parents=True, exist_ok=True)
        self.keys = Keys(home)
        self.ledger = Ledger(database.url_of(config))
        self.epoch = self.ledger.epoch()
        self.devices = Devices(self.ledger)
        self.topics = Topics(checked(config.fleet, "fleet"))
        self.blobs = Blobs(
            bus, self.topics, home / "blobs", config.limits.packet_bytes, config.limits.gather_ms
        )
        self.pending = Pending()
        self.live: dict[str, dict[str, Any]] = {}
        self.receiving = Receiving(
            home, config.limits, self.ledger, self.devices, self.pending, self.send, self.changed, self.live
        )
        self.uploads = self.receiving.uploads
        self.enrolment = Enrolment(config.enrolment, self.ledger, self.devices, authority)
        host = "0.0.0.0" if config.broker.url and authority else config.broker.host  # noqa: S104 - devices must reach it
        self.models = HttpsServer(config.https, home, self.devices.key, self.enrolment, host)
        self.admission = Admission(config.limits, self._misbehaves)
        self.receiving.refused = self.admission.strike
        self._cut = cut
        self.support = Support(self.devices, self.send)
        self.operators = Operators(config, self.ledger)
        self.jobs = Jobs(config, self.ledger, self, self.blobs, self.pending, self.models, self.operators)
        self.bytes_in: dict[str, int] = {}
        self.dropped = self.repeated = 0
        self._retained: dict[str, bytes] = {}
        self._tasks: set[asyncio.Task[Any]] = set()

    async def start(self) -> None:
        """Subscribe, connect, and begin with the oldest unfinished job."""
        self.bus.on_connect.append(self._connected)
        await self.bus.subscribe(self.topics.device("+", "up"), self._take)
        await self.bus.subscribe(self.topics.device("+", "chunk"), self._chunk)
        if self.config.https.models or self.enrolment.authority:
            await self.models.start()
        await self.bus.start()
        self._spawn(self.jobs.run(), "jobs")
        self._spawn(self._flushing(), "flush")

    async def stop(self) -> None:
        """End all tasks; the ledger stays as it is."""
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self.receiving.stop()
        self.flush()
        await self.bus.stop()
        await self.models.stop()
        self.ledger.close()

    def _spawn(self, work: Any, name: str) -> asyncio.Task[Any]:
        task = asyncio.create_task(work, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    def _connected(self) -> None:
        """A broker may have forgotten what was retained; say it again."""
        for topic, payload in self._retained.items():
            self._spawn(self.bus.publish(topic, payload, retain=True), "retain")

    def send(self, device: str, message: Message) -> None:
        """Seal for one device and publish."""
        key = self.devices.key(device)
        if key:
            self._spawn(
                self.bus.publish(self.topics.device(device, "down"), seal(message, "coordinator", key)),
                "send",
            )

    def ended(self, job: str, device: str, state: str) -> None:
        """Tell a device that a job is over."""
        self.publish(device, Done(job, state))
        self.live.pop(device, None)

    def publish(self, device: str, message: Assignment | Done) -> None:
        """The device's current work, signed, sealed and retained."""
        key = self.devices.key(device)
        if key is None:
            return
        if isinstance(message, Assignment):
            message = msgspec.structs.replace(message, epoch=self.epoch)
        payload = seal(message, "coordinator", key, self.keys.sign(body(message)))
        topic = self.topics.device(device, "job")
        self._retained[topic] = payload
        if isinstance(message, Assignment):
            self.live[device] = {"state": "assigned", "round": message.round, "arm": message.say}
        self._spawn(self.bus.publish(topic, payload, retain=True), "assign")

    def _remind(self, device: str) -> None:
        """A device that comes back hears again what it should be doing."""
        topic = self.topics.device(device, "job")
        if topic in self._retained:
            self._spawn(self.bus.publish(topic, self._retained[topic], retain=True), "remind")

    def in_words(self) -> str:
        """One line for whoever looks at the service."""
        if not self.bus.connected.is_set():
            return f"no broker: {getattr(self.bus, 'problem', '') or 'connecting'}"
        return self.jobs.problem or (f"job {self.jobs.runner.job}" if self.jobs.runner else "no job")

    def has(self, device: str) -> bool:
        """Is it still one of ours?"""
        return self.devices.enrolled(device)

    def tags(self, device: str) -> dict[str, str]:
        """What its owner says of it."""
        return self.devices.tags(device)

    def seen(self, device: str) -> float:
        """When it was last heard; 0 where it was not."""
        row = self.ledger.device_row(device)
        return float(row["seen"]) if row is not None else 0.0

    def eligible(self, plan: Plan) -> Any:
        """See `Devices.eligible`."""
        return self.devices.eligible(plan)

    def _take(self, topic: str, payload: bytes) -> None:
        device = device_of(topic)
        self.bytes_in[device] = self.bytes_in.get(device, 0) + len(payload)
        key = self.devices.key(device)
        if self.devices.suspended(device) or (key is not None and not self.admission.take(device)):
            return
        try:
            if key is None:
                raise WireError(f"device `{device}` is not known", "coordinator invite NAME")
            envelope = unpack(payload)
            if envelope.sender != device:
                raise WireError(f"`{envelope.sender[:64]}` publishes on the topic of `{device}`")
            message = open_up(envelope, key)
            if self.devices.repeated(device, envelope.mac):
                self.repeated += 1
                return
            self._handle(device, message)
        except WireError as error:
            self._drop(device, str(error))
        except Exception as error:
            log.exception("a message of %s failed", device)
            self._drop(device, f"{type(error).__name__}: {error}")

    def _drop(self, device: str, reason: str) -> None:
        self.dropped += 1
        log.warning("a message of `%s` was dropped: %s", device, reason)
        self.live.setdefault(device, {})["last_error"] = reason
        if self.devices.key(device) is not None:
            self.send(device, Sorry(reason))
            if self.devices.enrolled(device):
                self.admission.strike(device, reason)

    def _handle(self, device: str, message: Up) -> None:
        if isinstance(message, Hello):
            reason = self.enrolment.void(device) or self.devices.hello(device, message, time.time())
            self.send(device, Sorry(reason) if reason else Welcome(self.config.fleet))
            self._remind(device)
            self.changed()
            return
        if not self.devices.enrolled(device):
            raise WireError(f"device `{device}` has not said hello")
        if isinstance(message, Want):
            self.blobs.want(message.digest, message.missing)
        elif isinstance(message, Offer):
            self.receiving.offered(device, message)
        elif isinstance(message, Report):
            self.receiving.reported(device, message)
        elif isinstance(message, Bundle):
            self.support.answered(device, message)
        elif isinstance(message, Leave):
            self.enrolment.revoke(device)
            self._gone(device, "left")

    def _gone(self, device: str, state: str) -> None:
        """No round waits for it any longer, and no broker keeps work for it."""
        self.devices.leave(device, state)
        self.uploads.forget(device)
        self.receiving.gone(device, "the device was revoked" if state == "revoked" else "the device left")
        topic = self.topics.device(device, "job")
        if self._retained.pop(topic, None) is not None:
            self._spawn(self.bus.publish(topic, b"", retain=True), "clear")
        self.live.pop(device, None)
        self.changed()

    def revoke(self, device: str) -> bool:
        """Shut a device out at once and for good: nothing of it is taken any more, and its connection is cut.

        True where the broker is not ours, so that somebody must give it the new list.
        """
        if self.devices.key(device) is None:
            raise ConfigError(f"no device `{device}` is invited or enrolled", "coordinator devices")
        had = self.enrolment.revoke(device)
        self._gone(device, "revoked")
        log.warning("device `%s` was revoked", device)
        if had and self._cut:
            self._cut()
        return had and self._cut is None

    def _misbehaves(self, device: str, reason: str) -> None:
        if self.devices.enrolled(device):
            self.suspend(device, reason)

    def suspend(self, device: str, reason: str) -> None:
        """Keep a device out until an operator lets it go on; its rounds do not wait for it."""
        if not self.devices.enrolled(device):
            raise ConfigError(f"device `{device}` is not enrolled", "coordinator devices")
        log.error("device `%s` is suspended: %s", device, reason)
        self.send(device, Sorry(f"suspended: {reason}"))
        self.devices.suspend(device, reason)
        self.uploads.forget(device)
        self.receiving.gone(device, f"the device is suspended: {reason}")
        self.live[device] = {"state": "suspended", "last_error": reason}
        self.changed()

    def resume(self, device: str) -> None:
        """Let a suspended device go on."""
        if not self.devices.suspended(device):
            raise ConfigError(f"device `{device}` is not suspended", "coordinator devices")
        self.devices.resume(device)
        self.live.pop(device, None)
        self.changed()

    def _chunk(self, topic: str, payload: bytes) -> None:
        device = device_of(topic)
        self.bytes_in[device] = self.bytes_in.get(device, 0) + len(payload)
        if self.devices.suspended(device) or not (
            self.uploads.asked_of(device) or self.admission.take(device)
        ):
            return
        self.uploads.chunk(device, payload)
        upload = self.uploads.live.get(device)
        if upload is not None:
            self.live.setdefault(device, {}).update(
                state="sending", chunks=[len(upload.assembly.have), upload.assembly.blob.chunks]
            )

    def changed(self) -> None:
        """Something happened that the running job may wait for."""
        self.jobs.changed()

    def invite(self, device: str) -> str:
        """A one-time claim token for a device."""
        if device == COORDINATOR:
            raise ConfigError(
                f"no device can be called `{COORDINATOR}`: the coordinator is, towards the broker",
                "take another name",
            )
        door, pin = (self.models.url, self.models.public_pin) if self.enrolment.authority else ("", b"")
        claim = Claim(
            self.config.fleet,
            checked(device),
            self.broker_url,
            secrets.token_bytes(32),
            self.keys.public,
            door,
            pin,
            self.operators.admins(),
        )
        if self.devices.enrolled(device):
            self._gone(device, "left")  # its key is void from now on: no round waits for it
        self.enrolment.invited(device)
        self.devices.invite(device, link_key(claim))
        return write_claim(claim)

    async def _flushing(self) -> None:
        while True:
            await asyncio.sleep(FLUSH_S)
            try:
                self.uploads.save()
                self.flush()
            except (OSError, database.DatabaseAway) as error:
                log.error("the disk does not take what arrived: %s", error)

    def flush(self) -> None:
        """Bring the counts of received bytes to disk."""
        counts = {d: n for d, n in self.bytes_in.items() if n}
        self.bytes_in.clear()
        if counts:
            with self.ledger.write() as tx:
                tx.add_bytes(counts, time.time())
