"""What a running job holds and knows; the phases of its life (`loop.py`) work on it.

Everything that a restart needs is in the ledger and in files before anybody is told, so a kill at any
instant changes nothing: the same assignments are sent again, and a round that was being closed is closed
again from the same updates.
"""

import asyncio
import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import msgspec
import numpy as np

from rankfleet.bandit.tuner import NoArm, Tuner
from rankfleet.coordinator.jobs.plan import Plan
from rankfleet.federated.contract.contexts import Adapter, Member
from rankfleet.federated.contract.server_side import ServerSide
from rankfleet.federated.program.within import within
from rankfleet.federated.wire.messages import Assignment, ModelSource, read_assignment
from rankfleet.profiles.device import DeviceProfile

from ..config import Limits
from ..exchange.downloads import Blobs
from ..exchange.pending import Pending
from ..planning import importance
from ..planning.planner import Planner
from ..store.device_states import DeviceStates
from ..store.ledger import Ledger, Transaction
from ..store.versions import Registry, Version
from .nudges import Nudges

log = logging.getLogger(__name__)
Members = dict[str, tuple[DeviceProfile, dict[str, float]]]
"""Device → profile and measured milliseconds by bits."""


class Fleet(Protocol):
    """What a job needs to know of the devices."""

    def eligible(self, plan: Plan) -> Members:
        """The devices that may take part."""

    def has(self, device: str) -> bool:
        """Is it still one of ours: neither gone, nor revoked, nor invited anew?"""

    def tags(self, device: str) -> dict[str, str]:
        """What its owner says of it."""

    def seen(self, device: str) -> float:
        """When it was last heard, as seconds since the epoch; 0 where it was not."""

    def publish(self, device: str, assignment: Assignment) -> None:
        """Send, retained."""


class JobRunner:
    """Runs one job to its end. `changed` is set whenever something of this job arrived."""

    def __init__(
        self,
        job: str,
        plan: Plan,
        *,
        ledger: Ledger,
        home: Path,
        model_folder: Path,
        blobs: Blobs,
        fleet: Fleet,
        limits: Limits,
        pending: Pending,
        source: ModelSource | None = None,
        warrant: bytes | None = None,
        clock: Callable[[], float] = time.time,
        ticks: Callable[[], float] = time.monotonic,
    ) -> None:
        self.job, self.plan, self.ledger, self.home, self.blobs, self.fleet, self.clock = (
            job,
            plan,
            ledger,
            home,
            blobs,
            fleet,
            clock,
        )
        self.rounds = plan.spec.rounds * len(plan.stack.legs)
        """To the engine every leg is a round."""
        self.registry = Registry(home / "jobs" / job)
        self.planner = Planner(job, plan, model_folder, self.registry, blobs, source, warrant)
        self.server = ServerSide(plan.stack, job, self.rounds)
        self.devices = DeviceStates(home / "jobs" / job / "devices")
        self.server.devices = self.devices
        self.server.maps = {m.name: m for m in plan.modules}
        self.tuner = self.new_tuner({})
        self.changed = asyncio.Event()
        self.limits, self.pending = limits, pending
        # `clock` is written down; all waiting goes by `ticks`, which no correction of the clock can move.
        self.ticks = ticks
        self.nudges = Nudges(limits.nudge_s)
        self.norms: list[list[float]] = []
        """Norms of the updates of the last rounds, each for one step."""
        self.examples: dict[str, float] = {}
        """Device → how many examples it last trained on."""
        self._blobs: dict[int, set[str]] = {}
        self._version: Version | None = None

    @property
    def version(self) -> Version:
        """The newest version: what the current round starts from."""
        assert self._version is not None
        return self._version

    def new_tuner(self, state: dict[str, Any]) -> Tuner:
        """The job's tuner with a saved state."""
        plan, spec = self.plan, self.plan.spec
        return Tuner(
            plan.policy, plan.card, plan.modules, spec.arms, max_depth=plan.max_depth,
            length=spec.task.max_length,
            head=plan.head_size, wire_bits=plan.stack.wire_bits, seed=spec.seed, state=state or None,
        )  # fmt: skip

    def record(self, tx: Transaction, version: Version) -> None:
        """The version's files, then its row."""
        version.state = self.state()
        self.devices.keep(version.number)
        digest = self.registry.save(version)
        tx.record_version(self.job, version.number, digest, self.clock())

    def load(self, number: int) -> None:
        """Go on from a version on disk, with the state that methods and tuner had after it."""
        self._version = self.registry.load(number)
        self.devices.at(number)
        self.server.adapter = Adapter(self._version.pairs, self._version.dense, self._version.carry)
        self.restore(self._version.state)
        for row in self.ledger.answers_since(self.job, number - self.plan.spec.staleness, "body", "round"):
            self.note_blobs(row["round"], read_assignment(row["body"]))

    def adopt(self, version: Version) -> None:
        """Go on from a version that was just made and saved."""
        self._version = version
        self.devices.at(version.number)
        self.server.adapter = Adapter(version.pairs, version.dense, version.carry)

    def note_blobs(self, round: int, assignment: Assignment) -> None:
        """Blobs that a late update of this round may still refer to."""
        self._blobs.setdefault(round, set()).update(b.digest for b in assignment.blobs.values())

    def blobs_in_use(self, oldest: int) -> set[str]:
        """Digests that rounds from `oldest` on refer to."""
        self._blobs = {n: digests for n, digests in self._blobs.items() if n >= oldest}
        return set().union(*self._blobs.values())

    def restore(self, state: dict[str, Any]) -> None:
        """Methods' and tuner's state from a saved dictionary."""
        self.server.state = {n: state.get("methods", {}).get(n, {}) for n in self.plan.stack.methods}
        self.tuner = self.new_tuner(state.get("tuner", {}))
        self.examples = dict(state.get("examples", {}))
        self.norms = [list(r) for r in state.get("norms", [])]
        if "importance" in state:
            self.planner.rank(importance.restored(state["importance"]))
        self.planner.own = {
            d: {k: np.asarray(v) for k, v in told.items()}
            for d, told in state.get("own_importance", {}).items()
        }

    def state(self) -> dict[str, Any]:
        """The inverse of `restore`."""
        kept = {
            "methods": self.server.state,
            "tuner": self.tuner.state,
            "examples": self.examples,
            "norms": self.norms,
        }
        kept |= {"own_importance": self.planner.own} if self.planner.own else {}
        return kept | ({"importance": importance.saved(self.planner.scores)} if self.planner.ranked else {})

    async def members(self) -> Members:
        """Eligible devices that can hold an arm; waits until there are enough."""
        told = False
        while True:
            found: Members = {}
            for device, (profile, bits_ms) in sorted(self.fleet.eligible(self.plan).items()):
                try:
                    self.tuner.join(device, profile, bits_ms)
                    self.tuner.feasible(device, profile, 0)
                    found[device] = (profile, bits_ms)
                except NoArm as error:
                    if not told:
                        self.ledger.tell(self.job, device, str(error))
            if len(found) >= self.plan.spec.min_devices:
                return found
            if not told:
                self.ledger.tell(
                    self.job, "", f"waiting for {self.plan.spec.min_devices} devices, {len(found)} are there"
                )
                told = True
            await self.change(5.0)

    def described(self, members: Members) -> list[Member]:
        """Devices as `select` sees them, by name; by name alone where no method selects."""
        if not self.plan.stack.using("select"):
            return [Member(device) for device in sorted(members)]
        now = self.clock()
        since: dict[str, float] = {}
        for row in self.ledger.answers(self.job, None, "device", "sent_at", state="late"):
            since[row["device"]] = max(since.get(row["device"], 0.0), float(row["sent_at"]))
        described = []
        for device, (profile, _) in sorted(members.items()):
            seen = self.fleet.seen(device)
            busy, heard = max(0.0, now - since.get(device, now)), max(0.0, now - seen) if seen else None
            tags = self.fleet.tags(device)
            described.append(
                Member(
                    device, msgspec.to_builtins(profile), tags, self.examples.get(device, 0.0), busy, heard
                )
            )
        return described

    async def change(self, seconds: float) -> None:
        """Until something arrived, at most so long."""
        self.changed.clear()
        try:
            await within(seconds, self.changed.wait())
        except asyncio.TimeoutError:
            return

    async def while_paused(self) -> None:
        """Until an operator lets the job go on."""
        while (row := self.ledger.job(self.job)) is not None and row["state"] == "paused":
            await self.change(2.0)

    def server_rank(self) -> int:
        """The largest feasible rank over the devices that have joined."""
        ranks = []
        for device, (profile, _) in self.fleet.eligible(self.plan).items():
            try:
                ranks += (
                    [a.rank for a in self.tuner.feasible(device, profile, 0)]
                    if device in self.tuner.state["devices"]
                    else []
                )
            except NoArm:
                continue
        return max(ranks, default=max(self.plan.spec.arms.ranks))

    def update_path(self, number: int, device: str) -> Path:
        """Where an accepted update lies."""
        return self.home / "updates" / self.job / f"r{number:06d}" / device
