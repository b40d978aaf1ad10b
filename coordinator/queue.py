"""The queue of jobs: validated when they are submitted, run one after the other, each ended for good by a
row in the ledger."""

import asyncio
import errno
import logging
import time
from pathlib import Path
from typing import Protocol

from rankfleet.coordinator.jobs.plan import Plan
from rankfleet.federated.errors import ConfigError, RankfleetError
from rankfleet.federated.wire.messages import ModelSource
from rankfleet.federated.wire.states import HELD, JobState
from rankfleet.profiles.card import ModelCard, read_card

from .config import CoordinatorConfig
from .exchange.downloads import Blobs
from .exchange.https_server import HttpsServer
from .exchange.pending import Pending
from .jobs.spec import JobSpec, read_job
from .operators.roster_in_force import Operators
from .rounds.loop import run_job
from .rounds.run import Fleet as Members
from .rounds.run import JobRunner
from .store import database
from .store.ledger import Ledger

log = logging.getLogger(__name__)
PASSING = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO)
RETRY_S = 10.0
"""After a disk that was full, or a database that was away."""


class Fleet(Members, Protocol):
    """What the queue needs of the devices."""

    def ended(self, job: str, device: str, state: str) -> None:
        """Tell a device that a job is over."""


class Jobs:
    """`runner` is the job that runs now; `problem` is why it waits."""

    def __init__(
        self,
        config: CoordinatorConfig,
        ledger: Ledger,
        fleet: Fleet,
        blobs: Blobs,
        pending: Pending,
        models: HttpsServer,
        operators: Operators,
    ) -> None:
        self.config, self.ledger, self.fleet, self.blobs, self.pending, self.models = (
            config,
            ledger,
            fleet,
            blobs,
            pending,
            models,
        )
        self.operators = operators
        self.runner: JobRunner | None = None
        self.problem = ""
        self._cards: dict[str, ModelCard] = {}
        self._news = asyncio.Event()
        self._running: asyncio.Task[None] | None = None

    def changed(self) -> None:
        """Something happened that the queue or the running job may wait for."""
        self._news.set()
        if self.runner is not None:
            self.runner.changed.set()

    def _source(self, plan: Plan) -> ModelSource | None:
        return self.models.offer(plan.card.digest, Path(self.config.models[plan.spec.model]))

    def source_changed(self) -> None:
        """The server shows another certificate: the next assignments must name it."""
        if self.runner is not None:
            self.runner.planner.source = self._source(self.runner.plan)

    async def run(self) -> None:
        """One job after the other, in the order of submission."""
        while True:
            try:
                for row in self.ledger.jobs(HELD):
                    self.approved(row["id"])  # a kill may have come between its last signature and this
                waiting = self.ledger.open_jobs()
            except database.DatabaseAway as error:
                await self._wait_for_room("the ledger", error)
                continue
            if not waiting:
                self._news.clear()
                await self._news.wait()
                continue
            self._running = asyncio.create_task(self._job(waiting[0]["id"], waiting[0]["text"]), name="job")
            try:
                await asyncio.wait([self._running])
            finally:
                self._running.cancel()
                await asyncio.gather(self._running, return_exceptions=True)
            if not self._running.cancelled() and (failed := self._running.exception()) is not None:
                await self._wait_for_room(
                    "the ledger", failed
                )  # it could not even be written down how the job ended

    async def _job(self, job: str, text: str) -> None:
        state: JobState = "finished"
        reason = ""
        try:
            plan = self.plan(read_job(text))
            self.ledger.set_job(job, "running", before="queued")
            self.runner = JobRunner(
                job,
                plan,
                ledger=self.ledger,
                home=self.config.home,
                fleet=self.fleet,
                blobs=self.blobs,
                limits=self.config.limits,
                clock=lambda: time.time(),
                ticks=lambda: time.monotonic(),
                pending=self.pending,
                source=self._source(plan),
                warrant=self.operators.warrant(job, text),
                model_folder=Path(self.config.models[plan.spec.model]),
            )
            await run_job(self.runner)
        except asyncio.CancelledError:
            row = self.ledger.job(job)
            if row is None or row["state"] != "cancelled":
                raise
            state = "cancelled"
        except RankfleetError as error:
            state, reason = "failed", str(error)
            log.error("job %s failed: %s", job, error)
        except Exception as error:
            if isinstance(error, database.DatabaseAway) or (
                isinstance(error, OSError) and error.errno in PASSING
            ):
                # A disk that is full or a database that is away: nothing is lost, the job goes on when there
                # is room again.
                await self._wait_for_room(f"job {job}", error)
                return
            state, reason = "failed", f"{type(error).__name__}: {error}"
            log.exception("job %s failed", job)
        finally:
            self.runner = None
        self.problem = ""
        self._end(job, state, reason)

    async def _wait_for_room(self, who: str, error: BaseException) -> None:
        self.problem = f"{who} waits: {error.__cause__ or error}"
        log.error("%s", self.problem)
        await asyncio.sleep(RETRY_S)

    def _end(self, job: str, state: JobState, reason: str) -> None:
        self.ledger.set_job(job, state, reason=reason)
        self.ledger.tell(job, "", f"{state}{f': {reason}' if reason else ''}")
        for device in {r["device"] for r in self.ledger.answers(job)}:
            self.fleet.ended(job, device, state)

    def plan(self, spec: JobSpec) -> Plan:
        """The job with everything that follows from it. Raises ConfigError."""
        if spec.model not in self.config.models:
            raise ConfigError(
                f"the coordinator has no base model `{spec.model}`; it has "
                f"{', '.join(self.config.models) or 'none'}",
                f"add `models: {{{spec.model}: FOLDER}}` to the coordinator's YAML",
            )
        if spec.model not in self._cards:
            try:
                self._cards[spec.model] = read_card(Path(self.config.models[spec.model]))
            except (OSError, ValueError) as error:
                raise ConfigError(f"base model `{spec.model}`: {error}") from None
        return Plan(spec, self._cards[spec.model])

    def submit(self, text: str, signed: tuple[bytes, bytes] | None = None) -> str:
        """Queue a job, or hold it until enough operators have signed it. Raises ConfigError where it
        cannot be meant."""
        spec = read_job(text)
        self.plan(spec)
        job = self.ledger.add_job(spec.name, text)
        try:
            if signed:
                self.operators.sign(job, *signed)
        except RankfleetError:
            self.ledger.remove_job(job)
            raise
        self.approved(job)
        return job

    def approved(self, job: str) -> None:
        """Queue a held job, if nobody's signature is lacking."""
        row = self.ledger.job(job)
        if row is not None and row["state"] == HELD and not self.operators.lacks(job, row["text"]):
            self.ledger.set_job(job, "queued", before=HELD)
            self._news.set()

    def cancel(self, job: str) -> None:
        """Stop a job for good."""
        if not self.ledger.set_job(job, "cancelled"):
            raise ConfigError(f"no job `{job}`", "coordinator jobs")
        if self.runner is not None and self.runner.job == job and self._running:
            self._running.cancel()
        else:
            self._end(job, "cancelled", "")
