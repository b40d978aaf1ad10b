"""The agent's service: hears assignments, has them carried out, and keeps each update until its receipt
comes.

Imports neither NumPy, torch nor cryptography: idle it is an MQTT client and a few files. Nothing that
arrives can end it.
"""

import asyncio
import logging
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from rankfleet.federated.errors import Refused, WireError
from rankfleet.federated.program.files import digest_of
from rankfleet.federated.program.health import Condition, plain
from rankfleet.federated.program.within import within
from rankfleet.federated.transport.bus import Bus
from rankfleet.federated.transport.topics import Topics
from rankfleet.federated.version import VERSION
from rankfleet.federated.wire.messages import (
    Ask,
    Assignment,
    Bundle,
    DatasetOffer,
    Done,
    Grant,
    Hello,
    Message,
    Receipt,
    Report,
    Sorry,
    Welcome,
    open_down,
    seal,
    unpack,
)

from . import support
from .config import AgentConfig
from .exchange.base_models import Bases
from .exchange.downloads import Fetcher
from .exchange.outbox import Outbox
from .exchange.sending import Sender
from .order import Order, result_of
from .status import Status
from .supervise.disk import Writes
from .supervise.process import Engine, EngineFailed
from .trust import certificate, consent
from .trust.identity import Identity

log = logging.getLogger(__name__)
LOOK_S = 15.0
"""Between two looks at what may be wrong."""
SHORT_S = 1.0
"""A phase that is over sooner is not worth a message."""


class Agent:
    """One device. `run` returns when it is cancelled."""

    def __init__(
        self,
        identity: Identity,
        config: AgentConfig,
        bus: Bus,
        engine: Engine,
        profile: dict[str, Any],
        bits_ms: dict[str, float],
    ) -> None:
        self.identity, self.config, self.bus, self.engine = identity, config, bus, engine
        self.profile, self.bits_ms = profile, bits_ms
        self.topics = Topics(identity.fleet)
        self.outbox = Outbox(config.home)
        self.writes = Writes(config.home, config.disk)
        self.status = Status(config.home, bus, device=identity.device, fleet=identity.fleet, agent=VERSION)
        self.sender = Sender(
            self.outbox,
            self.status,
            self.say,
            lambda kind, payload: self._publish(kind, payload),
            config.link.answer_s,
        )
        self.fetcher = Fetcher(bus, self.topics, config.home / "blobs", self.say, config.link.answer_s)
        self.fetcher.kbps = config.link.down_kbps
        self.bases = Bases(
            config.home,
            identity,
            config.allow.model_mb,
            lambda done, total: self.status.set(model_mb=[done >> 20, total >> 20]),
        )
        self._assignment: tuple[Assignment, bytes, str] | None = None
        self._handled: dict[str, Report | None] = {}
        self._doing = ""
        self._welcome = asyncio.Event()
        self._over: set[str] = set()
        self._superseded = asyncio.Event()
        self._work = asyncio.Event()
        self._tasks: set[asyncio.Task[Any]] = set()
        self._narrow = asyncio.Lock()
        self._telling: asyncio.TimerHandle | None = None
        self._adapter = ""
        self._asked = False
        self.config_path: Path | None = None
        """The YAML that this was started with, for `doctor`."""
        self.conditions: Callable[[], list[Condition]] = list
        """What is wrong now (`health.conditions`); nothing until the program says how to look."""
        self.last_lines = support.LastLines()
        logging.getLogger().addHandler(self.last_lines)

    async def run(self) -> None:
        """Connect, and work until cancelled."""
        self.bus.on_connect.append(self._connected)
        await self.bus.subscribe(self.topics.device(self.identity.device, "down"), self._take)
        await self.bus.subscribe(self.topics.device(self.identity.device, "job"), self._take)
        loops = [
            asyncio.create_task(t, name=n)
            for t, n in (
                (self._working(), "work"), (self.sender.run(), "outbox"), (self._keeping(), "status"),
                (certificate.keep(self.config.home, self.bus, self.status), "certificate"),
            )
        ]  # fmt: skip
        try:
            await asyncio.gather(*loops)
        finally:
            for task in loops:
                task.cancel()
            logging.getLogger().removeHandler(self.last_lines)
            await self.engine.stop()
            await self.bus.stop()
            self.status.count()
            self.status.save()
            self.status.write(state="stopped")
            self.status.flush(now=True)

    def _connected(self) -> None:
        self._welcome.clear()
        self._spawn(self._greet(), "hello")
        self.sender.wake()
        self.fetcher.wake()

    async def _greet(self) -> None:
        """Say hello until somebody answers."""
        wait = self.config.link.answer_s
        while self.bus.connected.is_set() and not self._welcome.is_set():
            await self.say(self._hello())
            try:
                await within(wait, self._welcome.wait())
            except asyncio.TimeoutError:
                wait = min(2 * wait, 300.0)

    def _spawn(self, work: Any, name: str) -> None:
        task = asyncio.create_task(work, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _hello(self) -> Hello:
        offers = [DatasetOffer(n, d.task, 0) for n, d in self.config.datasets.items()]
        return Hello(
            profile=self.profile,
            datasets=offers,
            public_key=self.identity.public_key,
            agent=VERSION,
            models=list(self.config.models),
            methods=list(self.config.allow.methods),
            jobs=list(self.config.allow.jobs),
            require=list(self.config.require),
            bits_ms=self.bits_ms,
            tags=self.config.tags,
            held=[f"{m.job}/{m.round}" for _, m in self.outbox.due()],
        )

    async def say(self, message: Message) -> None:
        """Seal and publish one message."""
        await self._publish("up", seal(message, self.identity.device, self.identity.link_key))

    async def _publish(self, kind: str, payload: bytes) -> bool:
        """False for a piece whose connection was lost: the coordinator will say whether it came."""
        link = self.config.link
        if link.up_kbps or link.delay_ms:
            async with self._narrow:
                await asyncio.sleep(len(payload) * 8 / (link.up_kbps * 1e3) if link.up_kbps else 0.0)
            await asyncio.sleep(link.delay_ms / 1e3)
        return await self.bus.publish(
            self.topics.device(self.identity.device, kind), payload, again=kind != "chunk"
        )

    def _take(self, topic: str, payload: bytes) -> None:
        """A message of the coordinator; anything unreadable is logged and dropped."""
        if not payload:
            return
        try:
            envelope = unpack(payload)
            message = open_down(envelope, self.identity.link_key)
        except WireError as error:
            log.warning("a message on %s was dropped: %s", topic, error)
            self.status.fail(str(error))
            return
        if isinstance(message, Assignment):
            self._assigned(message, payload, digest_of(envelope.body))
        elif isinstance(message, Done):
            self._spawn(self._ended(message), "job-ended")
        elif isinstance(message, Grant | Receipt):
            self.sender.answer(message)
        elif isinstance(message, Ask):
            self._spawn(self._support(message), "support")
        elif isinstance(message, Welcome):
            self._welcome.set()
            self.status.facts.pop("last_error", None)
            self.status.write(state="idle" if self.status["state"] == "connecting" else self.status["state"])
        elif isinstance(message, Sorry):
            self._welcome.set()
            log.error("the coordinator says: %s", message.reason)
            self.status.fail(message.reason)

    async def _support(self, asked: Ask) -> None:
        """Answer an operator, if the owner lets us; one question at a time, however often it is heard."""
        if self._asked:
            return
        self._asked = True
        try:
            await self.say(Bundle(asked.number, await self._told(asked)))
        finally:
            self._asked = False

    async def _told(self, asked: Ask) -> str:
        if not self.config.allow.support:
            return "the owner of this device does not allow it (allow.support)"
        if asked.what == "logs":
            return self.last_lines.text() or "nothing was logged since the service started"
        return await support.doctor(self.config_path)

    def _assigned(self, job: Assignment, raw: bytes, key: str) -> None:
        """New work; or a question about work that we know, which is answered with where it stands."""
        try:
            if not self.outbox.begin(job.epoch):
                log.warning("round %d of %s: said before the coordinator was restored", job.round, job.job)
                return
        except OSError as error:
            self._spawn(self.say(Report(job.job, job.round, "failed", str(error), "job")), "report")
            return
        if self.outbox.over(job.job):
            log.warning("round %d of %s: that job has ended: an old message", job.round, job.job)
            self._spawn(
                self.say(Report(job.job, job.round, "failed", "that job has ended here", "job")), "report"
            )
            return
        if self.outbox.overtaken(result_of(self.outbox.jobs, job.job, job.round)):
            # It must not take the place of the current one. Whoever asks in earnest hears why nothing comes.
            reason = (
                "a later round was done here: an old message, or a coordinator put back to an older state"
            )
            log.warning("round %d of %s: %s", job.round, job.job, reason)
            self._spawn(self.say(Report(job.job, job.round, "failed", reason, "job")), "report")
            return
        self._assignment = (job, raw, key)
        if key not in self._handled or self._lost(job, key):
            self._handled.pop(key, None)
            self._superseded.set()
            self._work.set()
            return
        self._spawn(self.say(self._handled[key] or Report(job.job, job.round, "training")), "report")
        self.sender.mail.set()

    def _lost(self, job: Assignment, key: str) -> bool:
        """Was this done, and its update found damaged on disk since?"""
        done = key != self._doing and self._handled[key] is None
        return done and not self.outbox.finished(result_of(self.outbox.jobs, job.job, job.round))

    async def _ended(self, message: Done) -> None:
        if self._assignment and self._assignment[0].job == message.job:
            self._assignment = None
            self.status.counters.jobs_done += message.state == "finished"
            self.status.counters.done_at = time.time()
            await self.engine.stop()
            self.fetcher.forget(set())
        self._over.add(message.job)
        self._superseded.set()
        self.outbox.forget(message.job)
        self.status.write(state="idle", job=message.job, job_state=message.state)

    async def _working(self) -> None:
        while True:
            await self._work.wait()
            self._work.clear()
            if self._assignment is None:
                continue
            job, raw, key = self._assignment
            self._superseded.clear()
            result = result_of(self.outbox.jobs, job.job, job.round)
            if key in self._handled:
                continue
            self._handled[key], self._doing = None, key
            if not self.outbox.finished(result):
                self._handled[key] = await self._one(job, raw, result)
            self._doing = ""

    async def _one(self, job: Assignment, raw: bytes, result: Path) -> Report | None:
        """Carry out one assignment; every way it can fail ends in a report, which is returned."""
        try:
            dataset, model = consent.check(job, self.config)
            self._within_budget(job)
            self._phase(job, "downloading")
            blobs = await self._fetched(job)
            if blobs is None:
                return None
            model = await asyncio.to_thread(self.bases.folder, job, model)
            self._phase(job, "training")
            shelf_mb, cache_mb = self.writes.room(shutil.disk_usage(self.config.home).free / 1e6)
            order = Order(
                home=str(self.config.home),
                envelope=raw,
                blobs=blobs,
                result=str(result),
                dataset=dataset,
                model=model,
                threads=int(self.profile["threads"]),
                budget_mb=self._budget_mb(),
                chunk=min(self.config.link.packet_bytes, self.bus.packet),
                require=self.config.require,
                slots=self.config.worker.slots,
                inline=job.inline,
                shelf_mb=shelf_mb,
                cache_mb=cache_mb,
                writes_mb=self.writes.left_mb(),
                kernel_ms=self.bits_ms,
                accelerator=self.config.worker.accelerator,
            )
            await self._carried_out(order)
            if job.job in self._over:
                self.outbox.forget(job.job)
                return None
            self._phase(job, "sending")
            self.outbox.add(result)
            self.writes.add(
                sum(meta.cost.get("disk_mb", 0.0) for path, meta in self.outbox.due() if path == result)
            )
            self.fetcher.forget({b.digest for b in job.blobs.values()})
            self.sender.mail.set()
            return None
        except (Refused, EngineFailed, WireError, OSError) as error:
            code = getattr(error, "code", "consent" if isinstance(error, Refused) else "job")
            return await self._failed(job, str(error), code)
        except Exception as error:
            log.exception("an assignment failed")
            return await self._failed(job, f"{type(error).__name__}: {error}", "crash")

    async def _carried_out(self, order: Order) -> None:
        """In the worker; one that is killed by somebody else gets a second try. Raises EngineFailed."""
        try:
            await self.engine.run(order, lambda told: self.status.set(**told))
        except EngineFailed as failed:
            if not failed.again:
                raise
            log.warning("%s; once more", failed)
            self.status.set(worker_killed=self.status.get("worker_killed", 0) + 1)
            await self.engine.run(order, lambda told: self.status.set(**told))

    async def _fetched(self, job: Assignment) -> dict[str, str] | None:
        """The assignment's blobs as files; None if other work, or the end of the job, came first."""

        async def every() -> dict[str, str]:
            paths = await asyncio.gather(*(self.fetcher.get(b) for b in job.blobs.values()))
            return dict(zip(job.blobs, map(str, paths), strict=True))

        fetch, other = (
            asyncio.create_task(every(), name="fetch"),
            asyncio.create_task(self._superseded.wait(), name="superseded"),
        )
        try:
            await asyncio.wait({fetch, other}, return_when=asyncio.FIRST_COMPLETED)
            return fetch.result() if fetch.done() else None
        finally:
            fetch.cancel()
            other.cancel()

    async def _failed(self, job: Assignment, reason: str, code: str) -> Report:
        log.error("round %d of %s: %s", job.round, job.job, reason)
        self.status.fail(reason)
        self.status.write(state="idle")
        report = Report(
            job.job, job.round, "refused" if code in ("consent", "data") else "failed", reason, code
        )
        if job.job not in self._over:
            await self.say(report)
        return report

    def _budget_mb(self) -> float:
        budget = self.profile.get("model_budget_mb")
        return float(budget) if budget else 0.6 * float(self.profile["memory_mb"])

    def _within_budget(self, job: Assignment) -> None:
        if job.recipe.memory_mb > self._budget_mb():
            raise Refused(
                f"the arm needs {job.recipe.memory_mb:.0f} MB, this device allows {self._budget_mb():.0f} MB"
            )
        self.status.count()
        if self.status.counters.today > self.config.allow.mb_per_day * 1e6:
            raise Refused(
                f"{self.status.counters.today / 1e6:.0f} MB went over the link today, "
                f"{self.config.allow.mb_per_day:.0f} are allowed"
            )

    def _phase(self, job: Assignment, state: Literal["downloading", "training", "sending"]) -> None:
        """Where the round stands: on disk, and said to the coordinator where it lasts."""
        if self._telling:
            self._telling.cancel()
        if state != "sending":
            report = Report(job.job, job.round, state)
            self._telling = asyncio.get_running_loop().call_later(
                SHORT_S, lambda: self._spawn(self.say(report), "report")
            )
        r = job.recipe
        self.status.write(
            state=state,
            job=job.job,
            round=job.round,
            rounds=job.rounds,
            arm=job.say,
            bits=r.bits,
            prune=r.prune,
        )

    def _look_for_adapter(self) -> None:
        """Has the worker put another adapter in place? Then the owner's command is run."""
        if not self.config.on_adapter:
            return
        link = self.config.home / "adapter" / "current"
        now = os.readlink(link) if link.is_symlink() else link.read_text() if link.exists() else ""
        if now and now != self._adapter:
            self._spawn(self._on_adapter(), "on-adapter")
        self._adapter = now

    async def _on_adapter(self) -> None:
        try:
            process = await asyncio.create_subprocess_exec(
                *self.config.on_adapter,
                env={**os.environ, "RANKFLEET_ADAPTER": str(self.config.home / "adapter" / "current")},
            )
            if await process.wait():
                log.warning("on_adapter ended with code %d", process.returncode)
        except OSError as error:
            log.warning("on_adapter: %s", error)

    async def _keeping(self) -> None:
        while True:
            await asyncio.sleep(1.0)
            if self.status.count():
                self.status.write(resumed_down=self.fetcher.resumed)
            if self.status.every(LOOK_S):
                found = plain(self.conditions())
                if found != self.status.get("conditions", []):
                    self.status.write(conditions=found)
            self.status.flush()
            self._look_for_adapter()
