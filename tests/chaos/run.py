"""A run with faults, and what must be the same as in a run without."""

import asyncio
import contextlib
import json
import random
import time
from collections import Counter
from pathlib import Path
from typing import Any

import msgspec

from .fleet import Fleet

LIMIT_S = 3600.0
FAULTS = (
    "coordinator killed", "agent killed", "worker killed", "coordinator's power "
                                                           "cut", "agent's power cut", "broker killed",
    "broker killed, retained messages lost", "connections cut", "messages lost, doubled, delayed, swapped, "
                                                                "torn", "disk full", "clock set",
)  # fmt: skip


class Result(msgspec.Struct):
    """What one run gave."""

    faults: dict[str, int] = {}
    messages: dict[str, int] = {}
    ledger: list[Any] = []
    versions: list[str] = []
    folded: list[Any] = []
    seconds: float = 0.0
    recoveries: list[float] = []
    unusual: list[Any] = []
    """What the ledger says of assignments that did not end as they should, and its events."""


class Chaos:
    """Faults follow the rounds: `faults` of them over `rounds` rounds, at random moments within each."""

    def __init__(self, fleet: Fleet, rng: random.Random, rounds: int, faults: int) -> None:
        self.fleet, self.rng, self.rounds, self.faults = fleet, rng, rounds, faults
        self.done: Counter[str] = Counter()
        self.ticks = 0
        self.open: list[float] = []
        self.recoveries: list[float] = []
        self._later: set[asyncio.Task[None]] = set()
        self._killed_workers: set[tuple[int, str]] = set()

    def round(self) -> int:
        found = self.fleet.ask("select max(number) from rounds")
        return int(found[0][0] or 0) if found else 0

    def progress(self) -> int:
        """Grows with every update that was taken and every round that was closed."""
        found = self.fleet.ask(
            "select (select count(*) from assignments where digest != '') + (select count(*) from versions)"
        )
        return int(found[0][0]) if found else -1

    async def watch(self) -> None:
        """How long after each fault something is achieved again."""
        last = self.progress()
        while True:
            await asyncio.sleep(0.1)
            self.ticks += 1
            if self.ticks % 20 == 0:
                for machine in self.fleet.machines:
                    machine.supervise()
            now = self.progress()
            if now > last:
                at = time.monotonic()
                self.recoveries += [at - began for began in self.open]
                self.open.clear()
            last = max(now, last)

    async def strike(self) -> None:
        """All faults, one after the other."""
        for i in range(self.faults):
            due = i * self.rounds // self.faults
            while self.round() < due and self.fleet.job_state() not in ("finished", "failed"):
                self.hold(False)
                await asyncio.sleep(0.1)
            if self.fleet.job_state() in ("finished", "failed"):
                return
            self.hold(self.round() > due)
            await asyncio.sleep(self.rng.uniform(0.0, 1.2 if self.round() <= due else 0.3))
            while not await self.fault(kind := self.rng.choice(FAULTS)):
                await asyncio.sleep(0.01)
            self.done[kind] += 1
            self.open.append(time.monotonic())
        while self.fleet.job_state() not in ("finished", "failed"):
            self.hold(False)
            await asyncio.sleep(0.5)

    def hold(self, ahead: bool) -> None:
        """The job must not be over before the faults are: where rounds run ahead, no further one is opened.

        An answer may be lost as everything else; what the ledger says counts. The coordinator may be dead:
        the next look asks again.
        """
        state = self.fleet.job_state()
        if (ahead and state == "running") or (not ahead and state == "paused"):
            with contextlib.suppress(RuntimeError):
                self.fleet.coordinator.run(
                    "rankfleet.coordinator",
                    "pause" if ahead else "resume",
                    "toy-1",
                    "--config",
                    self.fleet.config,
                )

    async def fault(self, kind: str) -> bool:
        """Do it; False where there was nothing to do it to."""
        fleet, agent = self.fleet, self.rng.choice(list(self.fleet.agents))
        machine = fleet.coordinator if kind.startswith("coordinator") else fleet.agents[agent]
        if kind.endswith("power cut"):
            machine.cut_power()
            self.later(0.2, machine.start)
        elif kind in ("coordinator killed", "agent killed"):
            machine.kill()
            self.later(0.2, machine.start)
        elif kind == "worker killed":
            # The second kill in one assignment is reported as what it most likely is, a lack of memory: not
            # what is asked here.
            key = (self.round(), agent)
            if key in self._killed_workers or not machine.kill_worker():
                return False
            self._killed_workers.add(key)
        elif kind.startswith("broker"):
            fleet.kill_broker()
            await asyncio.sleep(self.rng.uniform(0.1, 1.0))
            fleet.start_broker(forget=kind.endswith("lost"))
        else:
            self._soft(kind, agent)
        return True

    def _soft(self, kind: str, agent: str) -> None:
        fleet = self.fleet
        if kind == "connections cut":
            fleet.proxies[agent].cut()
        elif kind.startswith("messages"):
            proxy = fleet.proxies[agent]
            proxy.wild = self.rng.uniform(0.1, 0.5)
            self.later(self.rng.uniform(1.0, 4.0), lambda: setattr(proxy, "wild", 0.0))
        elif kind == "disk full":
            fleet.coordinator.fill_disk(True)
            self.later(self.rng.uniform(0.3, 3.0), lambda: fleet.coordinator.fill_disk(False))
        else:
            self.rng.choice(fleet.machines).set_clock(
                self.rng.choice([-1, 1]) * 10 ** self.rng.uniform(0, 7.5)
            )

    def later(self, seconds: float, what: Any) -> None:
        async def wait() -> None:
            await asyncio.sleep(seconds)
            what()

        task = asyncio.create_task(wait(), name="later")
        self._later.add(task)
        task.add_done_callback(self._later.discard)


async def run(folder: Path, model: Path, seed: int, rounds: int, faults: int, **changes: Any) -> Result:
    """One job of `rounds` rounds, with `faults` faults."""
    rng = random.Random(seed)
    fleet = Fleet(folder, model, rng)
    began = time.monotonic()
    try:
        await fleet.start()
        fleet.submit(rounds=rounds, **changes)
        chaos = Chaos(fleet, rng, rounds, faults)
        tasks = [
            asyncio.create_task(chaos.strike(), name="strike"),
            asyncio.create_task(chaos.watch(), name="watch"),
        ]
        await fleet.until(lambda: fleet.job_state() in ("finished", "failed"), LIMIT_S)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        return _result(fleet, chaos, time.monotonic() - began)
    finally:
        await fleet.stop()


def _result(fleet: Fleet, chaos: Chaos, seconds: float) -> Result:
    rounds = fleet.ask("select number, folding from rounds order by number")
    return Result(
        dict(chaos.done),
        dict(sum((p.done for p in fleet.proxies.values()), Counter())),
        [
            list(r)
            for r in fleet.ask("select round, device, digest, state from assignments order by round, device")
        ],
        [r[0] for r in fleet.ask("select digest from versions order by number")],
        [tuple(x) for _, folding in rounds for x in json.loads(folding or "[]")],
        seconds,
        chaos.recoveries,
        fleet.ask(
            "select round, device, state, reason from assignments where state not in ('counted', 'received')"
        )
        + fleet.ask("select device, text from events where text != 'finished'"),
    )
