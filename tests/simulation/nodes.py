"""The nodes of a simulated fleet: the real services, and a training engine that needs NumPy alone."""

import asyncio
import contextvars
import json
import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from rankfleet.coordinator.config import CoordinatorConfig, Limits
from rankfleet.coordinator.service import Service
from rankfleet.edge_agent import order
from rankfleet.edge_agent.config import AgentConfig, Dataset, Link
from rankfleet.edge_agent.order import Order
from rankfleet.edge_agent.service import Agent
from rankfleet.edge_agent.trust import identity
from rankfleet.federated.contract.catalogue import build_stack
from rankfleet.federated.contract.client_side import ClientSide
from rankfleet.federated.contract.contexts import Round
from rankfleet.federated.contract.spec import Spec
from rankfleet.federated.contract.stack import Stack, seed_of
from rankfleet.federated.contract.tensors import Tensors
from rankfleet.federated.program.files import digest_of
from rankfleet.federated.wire.frame import encode, freeze, open_frame, thaw
from rankfleet.federated.wire.messages import Assignment, manifest, read_assignment, unpack
from rankfleet.federated.wire.transfer import blob_of
from rankfleet.profiles.device import library

from .bus import Broker, SimulatedBus
from .disk import Disk
from .loop import LIFE, Killed, Life

PACKET = 700
LABELS = ["a", "b"]


class Engine:
    """Stands in for the worker: the same files in, the same files out, and a delta that follows from the
    view and the seed."""

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng

    async def run(self, order: Order, progress: Any) -> None:
        await asyncio.sleep(self.rng.uniform(0.05, 1.5))
        carry_out(order)

    async def stop(self) -> None:
        return None


def carry_out(what: Order) -> None:
    """One round without torch."""
    job = read_assignment(unpack(what.envelope).body)
    frame, meta = open_frame(Path(what.blobs["view"]))
    spec = msgspec.convert(meta, Spec)
    told = {
        "version": job.version,
        "held": {"loss": 8.0 / (1 + job.version), "square": 8.0, "correct": 4.0, "count": 8.0},
    }
    result = Path(what.result)
    path = order.last_state(result)
    device = identity.load(Path(what.home)).device
    client = ClientSide(
        Stack(build_stack(job.stack), job.space), job.job, Round(job.round, job.rounds), device, spec,
        steps=job.recipe.steps,
        lr=job.recipe.lr, down={}, state=thaw(path.read_bytes()) if path else None,
    )  # fmt: skip
    start = client.begin({k: np.array(t, np.float32) for k, t in frame.items() if k in spec.shapes()})
    sent = client.send(_delta(job, device, start)) if job.purpose == "train" else {}
    update = encode(
        {f"d/{k}": t for k, t in sent.items()},
        {**told, "examples": 10, "loss_before": 1.0, "loss_after": 0.9},
    )
    blob = blob_of(update, what.chunk)
    signature = identity.signer(Path(what.home)).sign(manifest(job.job, job.round, device, blob.digest))
    order.commit(
        result,
        update,
        freeze(client.saved()),
        order.Meta(job.job, job.round, blob, signature, inline=what.inline),
    )


def _delta(job: Assignment, device: str, start: Tensors) -> Tensors:
    mark = digest_of(b"".join(start[k].tobytes() for k in sorted(start)))
    rng = np.random.default_rng(seed_of(job.seed, job.round, device, mark))
    return {k: (0.1 * rng.standard_normal(t.shape)).astype(np.float32) for k, t in sorted(start.items())}


class Node:
    """A machine: a home on a disk of its own, and one life after the other."""

    def __init__(self, name: str, home: Path, broker: Broker, rng: random.Random, model: Path) -> None:
        self.name, self.home, self.broker, self.rng, self.model = name, home, broker, rng, model
        home.mkdir(parents=True, exist_ok=True)
        self.disk = Disk(home, rng)
        self.life: Life | None = None
        self.bus: SimulatedBus | None = None
        self.program: Any = None
        self.lives = 0
        self._image = home.with_name(f"{home.name}.next")
        self._fuse, self._power, self._only = 0, False, False
        self.disk.touched = self.touched
        self.graveyard: list[Any] = []

    def start(self) -> None:
        """A new life from what is on disk."""
        if self._image.exists():
            self.disk.restore(self._image)
        self.life = Life(self.name)
        self.lives += 1
        identity.known.cache_clear()
        identity.signer.cache_clear()
        context = contextvars.copy_context()
        context.run(self._begin)

    def _begin(self) -> None:
        LIFE.set(self.life)
        self.bus = SimulatedBus(self.broker)
        self.program = self.make(self.bus)
        self.graveyard.append(asyncio.get_running_loop().create_task(self.run(), name=self.name))

    def make(self, bus: SimulatedBus) -> Any:
        """The service."""
        raise NotImplementedError

    async def run(self) -> None:
        """The service's life."""
        raise NotImplementedError

    @property
    def alive(self) -> bool:
        """Does it run?"""
        return self.life is not None and not self.life.dead

    def fuse(self, touches: int, power: bool, transactions: bool = False) -> None:
        """Kill it at its next but so many syncs or renames, or at the begin or end of a transaction alone."""
        self._fuse, self._power, self._only = touches, power, transactions

    def touched(self, transaction: bool = False) -> None:
        """Something goes to disk now."""
        if self._fuse and self.alive and LIFE.get() is self.life and (transaction or not self._only):
            self._fuse -= 1
            if not self._fuse:
                self.kill(self._power)
                raise Killed

    def kill(self, power: bool) -> None:
        """`kill -9`, or a power cut: what the next life finds is decided now."""
        if not self.alive or self.life is None:
            return
        self._fuse = 0
        self.disk.image(self._image, power)
        self.life.dead = self.disk.dead = True
        self.graveyard += list(asyncio.all_tasks())
        if self.bus:
            self.bus.gone()
        self.close()
        asyncio.get_running_loop().call_later(
            self.rng.uniform(0.1, 3.0), self.start, context=contextvars.Context()
        )

    def close(self) -> None:
        """Let go of what the operating system would take back."""


class Coordinator(Node):
    """The coordinator's machine."""

    def make(self, bus: SimulatedBus) -> Service:
        config = CoordinatorConfig(
            data_dir=str(self.home),
            models={"tiny": str(self.model)},
            limits=Limits(packet_bytes=PACKET, gather_ms=1, nudge_s=3),
        )
        return Service(config, bus, "mqtt://localhost")

    async def run(self) -> None:
        real = self.program.ledger.write

        @contextmanager
        def write() -> Iterator[Any]:
            """Before and after a transaction is a moment to be killed in, too."""
            self.touched(transaction=True)
            with real() as tx:
                yield tx
            self.touched(transaction=True)

        self.program.ledger.write = write
        await self.program.start()

    def close(self) -> None:
        self.program.ledger.close()


class Device(Node):
    """A device."""

    def make(self, bus: SimulatedBus) -> Agent:
        data = self.home.parent / "words.jsonl"
        config = AgentConfig(
            state_dir=str(self.home), datasets={"words": Dataset(str(data))},
            models={"tiny": str(self.model)},
            link=Link(packet_bytes=PACKET, answer_s=1.0),
        )  # fmt: skip
        profile = msgspec.structs.replace(
            library()["laptop-x86-16gb"], name="laptop-x86-16gb", threads=1, model_budget_mb=100.0
        )
        return Agent(
            identity.load(self.home), config, bus, Engine(self.rng), msgspec.to_builtins(profile), {}
        )

    async def run(self) -> None:
        await self.program.run()


def words(home: Path) -> None:
    """The file that devices map; nobody reads it here."""
    (home / "words.jsonl").write_text(json.dumps({"text": "a", "label": "a"}))
