"""One seed, one run: a fleet, a job, faults, and what must hold at the end whatever happened in between."""

import asyncio
import logging
import random
import shutil
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import msgspec
import yaml

from rankfleet.coordinator.store import tables
from rankfleet.edge_agent.trust import identity
from rankfleet.federated.wire.states import ENDED

from .bus import Broker
from .disk import attached
from .loop import Stuck, VirtualLoop, virtual_time
from .nodes import LABELS, Coordinator, Device, Node, words

ROUNDS, FAULTS, DEVICES = 20, 50, 3
LIMIT_S = 4 * 3600.0
ROWS = tuple[int, str, str, str]


class Outcome(msgspec.Struct):
    """What one run gave. `wrong` is empty where everything held."""

    seed: int
    faults: dict[str, int]
    ledger: list[ROWS]
    versions: list[str]
    longest_s: float
    """The longest that a round took, in virtual seconds."""
    virtual_s: float
    wrong: list[str]


def job(rounds: int) -> str:
    """Fixed arms, no deadline, everybody: the result must not depend on what goes wrong. Codec and server
    have state to lose."""
    return yaml.safe_dump(
        {
            "name": "sim", "model": "tiny", "task": {"dataset": "words", "labels": LABELS, "max_length": 16},
            "rounds": rounds,
            "adapter": {"targets": ["query", "value"], "max_depth": 2},
            "arms": {"ranks": [2], "bits": [32], "steps": [2], "batch": 4},
            "policy": {"name": "fixed"}, "deadline_s": 0, "quorum": 1.0, "min_devices": DEVICES,
            "stack": [{"sparse": {"keep": 0.25}}, "fedadam"], "frozen_every": 2,
        }
    )  # fmt: skip


class Simulation:
    """A fleet on a virtual clock."""

    def __init__(
        self, seed: int, home: Path, model: Path, loop: VirtualLoop, rounds: int, faults: int
    ) -> None:
        self.seed, self.home, self.rounds, self.loop = seed, home, rounds, loop
        self.rng = random.Random(f"{seed} faults")
        self.left = faults
        self.done: Counter[str] = Counter()
        self.broker = Broker(loop, random.Random(f"{seed} broker"))
        words(home)
        self.coordinator = Coordinator(
            "coordinator", home / "coordinator", self.broker, random.Random(f"{seed} c"), model
        )
        self.devices = [
            Device(f"d{i}", home / f"d{i}", self.broker, random.Random(f"{seed} d{i}"), model)
            for i in range(DEVICES)
        ]
        self.nodes: list[Node] = [self.coordinator, *self.devices]

    @property
    def ledger(self) -> Any:
        return self.coordinator.program.ledger

    async def until(self, what: Any) -> None:
        while not what():
            await asyncio.sleep(0.05)

    async def join(self) -> None:
        """Enrol everybody, without faults."""
        self.coordinator.start()
        for device in self.devices:
            identity.enroll(self.coordinator.program.invite(device.name), device.home)
            device.start()
        await self.until(
            lambda: all(r["state"] == "enrolled" for r in self.coordinator.program.devices.table())
        )
        for node in self.nodes:
            node.disk.synced(str(node.home))
            node.disk.content = {i: (node.home / n).read_bytes() for n, i in node.disk.now().items() if i}

    def finished(self) -> bool:
        """Has the job ended?"""
        if not self.coordinator.alive:
            return False
        row = self.ledger.row(tables.jobs, id="sim-1")
        return row is not None and row["state"] in ENDED

    async def faults(self) -> None:
        """One after the other, a moment apart."""
        while self.left and not self.finished():
            await asyncio.sleep(self.rng.expovariate(1 / 1.2))
            self.left -= 1
            kind = self.rng.choice(list(FAULT_KINDS))
            FAULT_KINDS[kind](self)
            self.done[kind] += 1

    def victim(self) -> Node:
        """Half of the time the coordinator."""
        return self.coordinator if self.rng.random() < 0.5 else self.rng.choice(self.devices)

    def kill(self, power: bool) -> None:
        """Now, or at one of the next moments in which something goes to disk; of the coordinator's, often
        between two transactions."""
        node, way = self.victim(), self.rng.random()
        if way < 0.3:
            node.kill(power)
        else:
            node.fuse(self.rng.randint(1, 12), power, transactions=way > 0.6 and node is self.coordinator)

    def disk_full(self) -> None:
        """The coordinator's disk takes nothing for a while, beginning at one of its next writes."""
        disk = self.coordinator.disk
        disk.fills_in = self.rng.randint(1, 12)

        def room() -> None:
            disk.full, disk.fills_in = False, 0

        self.loop.call_later(self.rng.uniform(0.5, 15.0), room)

    def deaf(self) -> None:
        """For a while the broker acknowledges everything and hands nothing to one of its clients."""
        if (bus := self.victim().bus) is not None:
            bus.deaf_until = self.loop.virtual.now + self.rng.uniform(0.5, 6.0)

    def wild(self) -> None:
        """For a while things happen to messages."""
        self.broker.wild = self.rng.uniform(0.05, 0.5)

        def calm() -> None:
            self.broker.wild = 0.0

        self.loop.call_later(self.rng.uniform(1.0, 6.0), calm)

    def clock(self) -> None:
        """A clock is set, forwards or backwards, by up to a year."""
        node = self.victim()
        if node.life:
            node.life.clock = self.rng.choice([-1, 1]) * 10 ** self.rng.uniform(0, 7.5)

    def replay(self) -> None:
        """Somebody says again what was said some time ago."""
        heard = self.broker.heard
        for topic, payload in self.rng.sample(heard, min(len(heard), 6)):
            self.broker.deliver(topic, payload, retain=False)

    def cut(self) -> None:
        """One connection ends."""
        if (bus := self.victim().bus) and bus in self.broker.clients:
            bus.cut()

    async def play(self) -> None:
        """Job and faults, until both are over and everything has settled."""
        await self.join()
        self.coordinator.program.jobs.submit(job(self.rounds))
        faults = self.loop.create_task(self.faults(), name="faults")
        await self.until(self.finished)
        faults.cancel()
        await self.until(
            lambda: (
                all(d.alive and not d.program.outbox.due() for d in self.devices) and self.coordinator.alive
            )
        )
        await asyncio.sleep(30)
        for topic, payload in self.broker.heard[:: max(1, len(self.broker.heard) // 200)]:
            self.broker.deliver(topic, payload, retain=False)
        await asyncio.sleep(30)

    def judge(self) -> Outcome:
        """What the ledger says, and what is wrong with it on its own."""
        wrong = []
        row = self.ledger.row(tables.jobs, id="sim-1")
        if row is None or row["state"] != "finished":
            wrong.append(f"the job is {row['state'] if row else 'lost'}: {row['reason'] if row else ''}")
        rows = [
            (r["round"], r["device"], r["digest"], r["state"])
            for r in self.ledger.rows(tables.assignments, job="sim-1")
        ]
        wrong += [
            f"round {r} of {d} is {s}"
            for r, d, _, s in rows
            if s != ("received" if r == self.rounds else "counted")
        ]
        wrong += [
            f"{d.name} still holds {len(d.program.outbox.due())} updates"
            for d in self.devices
            if d.program.outbox.due()
        ]
        wrong += [
            f"{d.name} is {d.program.status['state']} when all is over"
            for d in self.devices
            if d.program.status["state"] != "idle"
        ]
        wrong += [f"unexpected: {type(e).__name__}: {e}" for e in self.loop.errors[:3]]
        closed = [r for r in self.ledger.rows(tables.rounds, job="sim-1") if r["closed"]]
        versions = [r["digest"] for r in self.ledger.rows(tables.versions, job="sim-1")]
        spans = [b - a for a, b in zip(self.closings, self.closings[1:], strict=False)]
        if len(closed) != self.rounds + 1:
            wrong.append(f"{len(closed)} rounds are closed, not {self.rounds + 1}")
        return Outcome(
            self.seed, dict(self.done), rows, versions, max(spans, default=0.0), self.loop.virtual.now, wrong
        )

    @property
    def closings(self) -> list[float]:
        """When each round was closed; clocks jump, so this is only as good as they are."""
        return sorted(float(r["closed"]) for r in self.ledger.rows(tables.rounds, job="sim-1") if r["closed"])

    def close(self) -> None:
        """Let go of files and tasks; whatever their last words are, nobody hears them."""
        for node in self.nodes:
            if node.program is not None and node is self.coordinator:
                node.close()


FAULT_KINDS: dict[str, Any] = {
    "kill": lambda s: s.kill(False),
    "power cut": lambda s: s.kill(True),
    "broker killed": lambda s: s.broker.restart(s.rng.uniform(0.1, 4.0), True),
    "broker forgets": lambda s: s.broker.restart(s.rng.uniform(0.1, 4.0), False),
    "connection cut": Simulation.cut,
    "wild messages": Simulation.wild,
    "nothing delivered": Simulation.deaf,
    "disk full": Simulation.disk_full,
    "clock set": Simulation.clock,
    "replay": Simulation.replay,
}


def simulate(seed: int, model: Path, *, rounds: int = ROUNDS, faults: int = FAULTS) -> Outcome:
    """One run. The same seed gives the same run, in the same version of the code."""
    logging.disable(logging.CRITICAL)
    base = Path("/dev/shm") if Path("/dev/shm").is_dir() else None
    home = Path(tempfile.mkdtemp(prefix="simulation-", dir=base))
    loop = VirtualLoop(random.Random(f"{seed} loop"), LIMIT_S)
    simulation = None
    hook, sys.unraisablehook = sys.unraisablehook, lambda _: None
    try:
        with virtual_time(loop):
            asyncio.set_event_loop(loop)
            simulation = Simulation(seed, home, model, loop, rounds, faults)
            with attached([n.disk for n in simulation.nodes]):
                try:
                    loop.run_until_complete(simulation.play())
                    return simulation.judge()
                except Stuck as error:
                    outcome = simulation.judge()
                    outcome.wrong.insert(0, f"stuck: {error}")
                    return outcome
    finally:
        if simulation:
            simulation.close()
            _bury(simulation, loop)
        asyncio.set_event_loop(None)
        shutil.rmtree(home, ignore_errors=True)
        sys.unraisablehook = hook
        logging.disable(logging.NOTSET)


def _bury(simulation: Simulation, loop: VirtualLoop) -> None:
    """End what was left standing; no coroutine may speak when it is collected."""
    loop.errors = []
    for node in simulation.nodes:
        for task in {*node.graveyard, *asyncio.all_tasks(loop)}:
            task._log_destroy_pending = False
            coroutine = task.get_coro()
            try:
                coroutine.close()
            except BaseException:
                continue
        node.graveyard.clear()
    loop.close()
