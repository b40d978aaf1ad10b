"""A job's life: open a round, wait, close it, again; then install the result.

Everything that a restart needs is in the ledger and in files before anybody is told, so a kill at any instant changes nothing:
the same assignments are sent again, and a round that was being closed is closed again from the same updates.
"""

import asyncio
import logging
import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import msgspec
from sqlalchemy import delete, insert, update
from sqlalchemy.engine import RowMapping

from bandit.arms import Arm
from bandit.policy import Choice
from bandit.tuner import NoArm, Tuner
from federated.errors import ConfigError, Refused, WireError
from federated.files import write_atomic
from federated.messages import Assignment, body, read_assignment
from federated.stack import ServerSide
from federated.update import Update
from federated.wire import freeze, thaw
from profiles.device import DeviceProfile

from . import apply, quality, store
from .blobs import Blobs
from .incoming import lift
from .job import Plan
from .planner import Planner
from .registry import Registry, Version
from .views import grow

log = logging.getLogger(__name__)
KEEP = 3
"""Versions whose views are kept for late updates."""
ATTEMPTS = 5
INSTALL_S = 120.0
LATE_DISCOUNT = 0.5


class Fleet(Protocol):
    """What a job needs to know of the devices."""

    def eligible(self, plan: Plan) -> dict[str, tuple[DeviceProfile, dict[str, float]]]:
        """Device → profile and measured milliseconds by bits, for the devices that may take part."""

    def publish(self, device: str, assignment: Assignment) -> None:
        """Send, retained."""


class JobRunner:
    """Runs one job to its end. `changed` is set whenever something of this job arrived."""

    def __init__(
        self,
        job: str,
        plan: Plan,
        *,
        ledger: store.Store,
        home: Path,
        model_folder: Path,
        blobs: Blobs,
        fleet: Fleet,
        nudge_s: float = 20.0,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.job, self.plan, self.ledger, self.home, self.blobs, self.fleet, self.clock = job, plan, ledger, home, blobs, fleet, clock
        self.registry = Registry(home / "jobs" / job)
        self.planner = Planner(job, plan, model_folder, self.registry, blobs)
        self.server = ServerSide(plan.stack, job, plan.spec.rounds)
        self.tuner = self._tuner({})
        self.changed = asyncio.Event()
        self.version: Version | None = None
        self.nudge_s = nudge_s
        self._nudges: dict[tuple[int, str], tuple[float, float]] = {}

    def _tuner(self, state: dict[str, Any]) -> Tuner:
        spec = self.plan.spec
        return Tuner(
            self.plan.policy,
            self.plan.card,
            self.plan.modules,
            spec.arms,
            max_depth=self.plan.max_depth,
            length=spec.task.max_length,
            head=self.plan.head_size,
            keep=self.plan.keep,
            seed=spec.seed,
            state=state or None,
        )

    async def run(self) -> None:
        """Until the job is finished. Raises ConfigError where it cannot go on."""
        await self._begin()
        while self._now() < self.plan.spec.rounds:
            number = self._now()
            await self._while_paused()
            row = self.ledger.row(store.rounds, job=self.job, number=number)
            if row is None:
                await self._open(number)
            else:
                self._reopen(number)
            await self._wait(number)
            await self._close(number)
        await self._install()

    def _now(self) -> int:
        assert self.version is not None
        return self.version.number

    async def _begin(self) -> None:
        done = self.ledger.rows(store.versions, job=self.job)
        if done:
            self._load(max(r["number"] for r in done))
            return
        await self._devices()
        version = self.planner.first_version(self._server_rank())
        self._save(version, {})

    def _load(self, number: int) -> None:
        self.version = self.registry.load(number)
        self.server.state = {n: self.version.state.get("methods", {}).get(n, {}) for n in self.plan.stack.methods}
        self.tuner = self._tuner(self.version.state.get("tuner", {}))

    def _save(self, version: Version, metrics: dict[str, Any]) -> None:
        version.state = {"methods": self.server.state, "tuner": self.tuner.state}
        digest = self.registry.save(version)
        self.ledger.put(
            store.versions,
            {"job": self.job, "number": version.number},
            state="candidate",
            digest=digest,
            created=self.clock(),
            metrics=store.text(metrics),
        )
        self._load(version.number)

    async def _devices(self) -> dict[str, tuple[DeviceProfile, dict[str, float]]]:
        """Eligible devices that can hold an arm; waits until there are enough."""
        told = False
        while True:
            found = {}
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
                self.ledger.tell(self.job, "", f"waiting for {self.plan.spec.min_devices} devices, {len(found)} are there")
                told = True
            await self._change(5.0)

    async def _change(self, seconds: float) -> None:
        self.changed.clear()
        try:
            await asyncio.wait_for(self.changed.wait(), seconds)
        except asyncio.TimeoutError:
            return

    async def _while_paused(self) -> None:
        while (row := self.ledger.row(store.jobs, id=self.job)) is not None and row["state"] == "paused":
            await self._change(2.0)

    def _server_rank(self) -> int:
        """The largest feasible rank over the enrolled devices."""
        ranks = [
            a.rank for d, (p, _) in self.fleet.eligible(self.plan).items() if d in self.tuner.state["devices"] for a in self._feasible(d, p)
        ]
        return max(ranks, default=max(self.plan.spec.arms.ranks))

    def _feasible(self, device: str, profile: DeviceProfile) -> list[Any]:
        try:
            return self.tuner.feasible(device, profile, 0)
        except NoArm:
            return []

    async def _open(self, number: int) -> None:
        """Choose devices and arms, write everything down, then tell them."""
        assert self.version is not None
        members = await self._devices()
        self.server.fleet = len(members)
        self.version.pairs = {m: self._grown(m) for m in self.version.pairs}
        chosen = self.server.select(sorted(members), number) or sorted(members)
        shares = self._shares(chosen)
        choices = self.tuner.choose(number, [(d, members[d][0], shares[d]) for d in chosen])
        expected = self._expected(choices, {d: members[d][0] for d in chosen}, number)
        made = {d: self.planner.assign(self.version, number, d, choices[d], self.server) for d in chosen}
        self.registry.save(self.version)
        write_atomic(
            self.registry.folder / f"open{number:06d}",
            freeze({"methods": self.server.state, "tuner": self.tuner.state, "fleet": self.server.fleet}),
        )
        with self.ledger.write() as tx:
            tx.execute(insert(store.rounds).values(job=self.job, number=number, state="open", opened=self.clock(), expected_s=expected))
            for device, assignment in made.items():
                tx.execute(
                    insert(store.assignments).values(
                        job=self.job,
                        round=number,
                        device=device,
                        state="assigned",
                        body=body(assignment),
                        why=choices[device].why,
                        arm=store.text(msgspec.to_builtins(choices[device].arm)),
                        sent_at=self.clock(),
                    )
                )
        for device, assignment in made.items():
            self.fleet.publish(device, assignment)

    def _grown(self, module: str) -> Any:
        assert self.version is not None
        pair = self.version.pairs[module]
        limit = min(pair.B.shape[0], pair.A.shape[1])
        return grow(pair, min(self._server_rank(), limit)) if self.plan.stack.space == "product" else pair

    def _shares(self, devices: list[str]) -> dict[str, float]:
        """Shares of the data, as far as earlier rounds told; equal before."""
        known: dict[str, float] = {}
        for row in self.ledger.rows(store.assignments, job=self.job):
            if examples := store.read(row["telemetry"]).get("examples"):
                known[row["device"]] = float(examples)
        middle = sorted(known.values())[len(known) // 2] if known else 1.0
        total = sum(known.get(d, middle) for d in devices)
        return {d: known.get(d, middle) / total for d in devices}

    def _expected(self, choices: dict[str, Choice], profiles: dict[str, DeviceProfile], number: int) -> float:
        times = [a.seconds for d, c in choices.items() for a in self.tuner.feasible(d, profiles[d], number) if a.arm == c.arm]
        return max(times, default=60.0)

    def _reopen(self, number: int) -> None:
        """After a restart: the state of the open round, and the same assignments again."""
        saved = thaw((self.registry.folder / f"open{number:06d}").read_bytes())
        self.server.state = {n: saved["methods"].get(n, {}) for n in self.plan.stack.methods}
        self.server.fleet = int(saved["fleet"])
        self.tuner = self._tuner(saved["tuner"])
        for row in self.ledger.rows(store.assignments, job=self.job, round=number):
            assignment = read_assignment(row["body"])
            for blob in assignment.blobs.values():
                self.blobs.know(blob)
            if row["state"] == "assigned":
                self.fleet.publish(row["device"], assignment)

    async def _wait(self, number: int) -> None:
        """Until the round may close. A round in which everybody failed is opened again with what was learnt."""
        for _ in range(ATTEMPTS):
            while True:
                row = self.ledger.row(store.rounds, job=self.job, number=number)
                assert row is not None
                if row["state"] == "closing":
                    return
                rows = self.ledger.rows(store.assignments, job=self.job, round=number)
                if all(r["state"] in ("failed", "refused") for r in rows):
                    break
                if self._may_close(rows, row, number):
                    return
                self._nudge(rows)
                await self._change(min(1.0, self.nudge_s))
            await self._again(number, rows)
        raise ConfigError(f"round {number}: every device failed {ATTEMPTS} times; the last reason: {rows[-1]['reason']}")

    def _nudge(self, rows: list[RowMapping]) -> None:
        """Brokers lose messages: ask devices that have been silent, by sending their assignment again."""
        now = self.clock()
        for row in rows:
            key = (row["round"], row["device"])
            due, wait = self._nudges.get(key, (now + self.nudge_s, self.nudge_s))
            if row["state"] == "assigned" and now >= due:
                self.fleet.publish(row["device"], read_assignment(row["body"]))
                due, wait = now + 2 * wait, min(2 * wait, 600.0)
            self._nudges[key] = (due, wait)

    def _may_close(self, rows: list[RowMapping], row: RowMapping, number: int) -> bool:
        spec = self.plan.spec
        arrived = sum(1 for r in rows if r["state"] == "received")
        open_ = sum(r["state"] == "assigned" for r in rows)
        said = self.server.ready(arrived, len(rows), number)
        if said or not open_:
            return arrived >= 1
        limit = 2 * float(row["expected_s"]) + 30 if spec.deadline_s == "auto" else float(spec.deadline_s)
        waited = self.clock() - float(row["opened"])
        if not limit or waited < limit or arrived < min(spec.min_devices, len(rows)):
            return False
        return arrived >= spec.quorum * len(rows) or (arrived >= 1 and waited >= 3 * limit)

    async def _again(self, number: int, rows: list[RowMapping]) -> None:
        known = {d: p for d, (p, _) in self.fleet.eligible(self.plan).items()}
        bits = {d: b for d, (_, b) in self.fleet.eligible(self.plan).items()}
        self.tuner.observe([quality.outcome(r, known[r["device"]].name) for r in rows if r["device"] in known], known, bits)
        for r in rows:
            self.ledger.tell(self.job, r["device"], f"round {number} starts again: {r['reason']}")
        await self._change(2.0)
        with self.ledger.write() as tx:
            for table, column in ((store.rounds, store.rounds.c.number), (store.assignments, store.assignments.c.round)):
                tx.execute(delete(table).where(table.c.job == self.job, column == number))
        await self._open(number)

    async def _close(self, number: int) -> None:
        row = self.ledger.row(store.rounds, job=self.job, number=number)
        assert row is not None
        if row["state"] != "closing":
            folding = [[r["device"], r["round"]] for r in self._foldable(number)]
            self.ledger.change(store.rounds, {"job": self.job, "number": number}, state="closing", folding=store.text(folding))
            row = self.ledger.row(store.rounds, job=self.job, number=number)
            assert row is not None
        version = await asyncio.to_thread(self._make, number, store.read(row["folding"]))
        rows = self.ledger.rows(store.assignments, job=self.job, round=number)
        metrics = quality.of_version(rows)
        self._judge(number, metrics)
        self._save(version, {})
        with self.ledger.write() as tx:
            tx.execute(
                update(store.rounds)
                .where(store.rounds.c.job == self.job, store.rounds.c.number == number)
                .values(state="closed", closed=self.clock(), info=store.text(quality.summary(rows)))
            )
            for device, of in store.read(row["folding"]):
                a = store.assignments
                tx.execute(
                    update(a)
                    .where(a.c.job == self.job, a.c.round == of, a.c.device == device, a.c.state != "refused")
                    .values(state="counted", folded=number)
                )
            a = store.assignments
            tx.execute(update(a).where(a.c.job == self.job, a.c.round == number, a.c.state == "assigned").values(state="late"))
        self._tidy(version.number)

    def _foldable(self, number: int) -> list[RowMapping]:
        """This round's updates, and late ones whose base version is still known."""
        fold = self.plan.spec.late == "fold"
        return [
            r
            for r in self.ledger.rows(store.assignments, job=self.job)
            if r["state"] == "received" and (r["round"] == number or (fold and 0 < number - r["round"] <= KEEP))
        ]

    def _make(self, number: int, folding: list[list[Any]]) -> Version:
        """The next version, from the ledger and files alone."""
        assert self.version is not None
        updates = [u for device, of in sorted(folding) if (u := self._lift(device, of, number)) is not None]
        if not updates:
            raise ConfigError(f"round {number}: no update could be used; `coordinator rounds {self.job}` says why")
        admitted = self.server.admit(updates, number)
        change = apply.reduce(self.server, admitted or updates, number)
        version = apply.step(self.version, change, number)
        self.planner.carry_views(self.version, version)
        self._observe(number, updates)
        return version

    def _lift(self, device: str, of: int, number: int) -> Update | None:
        row = self.ledger.row(store.assignments, job=self.job, round=of, device=device)
        if row is None or row["state"] == "refused":
            return None
        path = self.update_path(of, device)
        try:
            made = lift(path, read_assignment(row["body"]), device, self.server, self.blobs, number - of)
        except (WireError, OSError, Refused) as error:
            self.ledger.change(store.assignments, {"job": self.job, "round": of, "device": device}, state="refused", reason=str(error))
            self.ledger.tell(self.job, device, f"its update of round {of} was put aside: {error}")
            return None
        if made.age and not self.plan.stack.using("ready"):
            made = replace(made, weight=made.weight * LATE_DISCOUNT**made.age)
        return made

    def update_path(self, number: int, device: str) -> Path:
        """Where an accepted update lies."""
        return self.home / "updates" / self.job / f"r{number:06d}" / device

    def _observe(self, number: int, updates: list[Update]) -> None:
        eligible = self.fleet.eligible(self.plan)
        known, bits = {d: p for d, (p, _) in eligible.items()}, {d: b for d, (_, b) in eligible.items()}
        rows = [
            r for r in self.ledger.rows(store.assignments, job=self.job, round=number) if r["device"] in known and r["state"] != "assigned"
        ]
        norms = {u.device: u.norm() for u in updates}
        total = sum(norms.values()) or 1.0
        self.tuner.observe([quality.outcome(r, known[r["device"]].name, norms.get(r["device"], 0.0) / total) for r in rows], known, bits)

    def _judge(self, number: int, metrics: dict[str, Any]) -> None:
        """What devices measured of this version on their own held-out tenth decides whether it is `good`."""
        older = [r for r in self.ledger.rows(store.versions, job=self.job) if r["state"] == "good" and r["number"] < number]
        last = store.read(older[-1]["metrics"]) if older else {}
        state = "good" if quality.good_enough(metrics, last) else "candidate"
        self.ledger.change(store.versions, {"job": self.job, "number": number}, state=state, metrics=store.text(metrics))

    def _tidy(self, number: int) -> None:
        """Raw updates and views that no late update can need any more go; digests stay in the ledger."""
        self.registry.forget_before(number - KEEP, {self.planner.snapshot_number(number), 0})
        for path in (self.home / "updates" / self.job).glob("r??????"):
            if int(path.name[1:]) < number - KEEP:
                shutil.rmtree(path, ignore_errors=True)
        for path in self.registry.folder.glob("open??????"):
            if int(path.name[4:]) < number - KEEP:
                path.unlink(missing_ok=True)
        keep = {
            b.digest
            for r in self.ledger.rows(store.assignments, job=self.job)
            if r["round"] >= number - KEEP
            for b in read_assignment(r["body"]).blobs.values()
        }
        self.blobs.forget(keep)

    async def _install(self) -> None:
        """Give the last version to every device that took part, and let it be measured there."""
        number = self.plan.spec.rounds
        if self.ledger.row(store.rounds, job=self.job, number=number) is None:
            await self.install(self._now(), number)
        else:
            for row in self.ledger.rows(store.assignments, job=self.job, round=number):
                for blob in read_assignment(row["body"]).blobs.values():
                    self.blobs.know(blob)
                if row["state"] == "assigned":
                    self.fleet.publish(row["device"], read_assignment(row["body"]))
        end = self.clock() + INSTALL_S
        while self.clock() < end:
            rows = self.ledger.rows(store.assignments, job=self.job, round=number)
            if all(r["state"] != "assigned" for r in rows):
                break
            self._nudge(rows)
            await self._change(min(1.0, self.nudge_s))
        self._judge(self._now(), quality.of_version(self.ledger.rows(store.assignments, job=self.job, round=number)))
        self.ledger.change(store.rounds, {"job": self.job, "number": number}, state="closed", closed=self.clock())

    async def install(self, version_number: int, number: int) -> None:
        """Send `version_number` to every device that ever took part, as round `number`."""
        version = self.registry.load(version_number)
        arms: dict[str, Arm] = {
            r["device"]: msgspec.convert(store.read(r["arm"]), Arm)
            for r in self.ledger.rows(store.assignments, job=self.job)
            if r["round"] < self.plan.spec.rounds
        }
        made = {d: self.planner.install(version, d, arm, self.server) for d, arm in sorted(arms.items())}
        with self.ledger.write() as tx:
            tx.execute(insert(store.rounds).values(job=self.job, number=number, state="open", opened=self.clock()))
            for device, assignment in made.items():
                tx.execute(
                    insert(store.assignments).values(
                        job=self.job,
                        round=number,
                        device=device,
                        state="assigned",
                        body=body(assignment),
                        arm=store.text(msgspec.to_builtins(arms[device])),
                        sent_at=self.clock(),
                    )
                )
        for device, assignment in made.items():
            self.fleet.publish(device, assignment)
