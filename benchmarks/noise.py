"""Agents that do everything but train: each round adds a slice of a seeded noise table to the adapter.

    python -m benchmarks.noise run agent.yaml     one real agent with a worker process of its own
    python -m benchmarks.noise fleet FOLDER       one coroutine for each `FOLDER/*.yaml` in this process,
                                                  with two worker processes for all

Identity, signatures, codecs, outbox, fsync, receipts: the code that is shipped. Only `Trainer` and the
base model are replaced.
"""

import argparse
import asyncio
import contextlib
import signal
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any, ClassVar, cast

from rankfleet.edge_agent.machine import system
from rankfleet.edge_agent.order import Order

WORKERS = 2
"""A worker process for each agent, as shipped, would take 300 MB a hundred times; these hold the workers
of all, each with its state."""
_workers: dict[str, Any] = {}


def _run(order: Order) -> float | None:
    """In a worker process: carry out one order; seconds until `_idle` has something to do."""
    from .noise_worker import NoiseWorker

    worker = _workers.get(order.home)
    if worker is None:
        worker = _workers[order.home] = NoiseWorker()
        worker._cards = next(iter(_workers.values()))._cards
    worker.run(order, lambda told: None)
    return cast("float | None", worker.idle_in())


def _idle(home: str) -> None:
    _workers[home].idle()


class SharedEngine:
    """Stands where `ProcessEngine` stands: the worker's code in one of a few processes, always the same
    one for an agent."""

    pools: ClassVar[list[ProcessPoolExecutor]] = []

    def __init__(self, number: int) -> None:
        if not self.pools:
            self.pools.extend(
                ProcessPoolExecutor(1, get_context("spawn"), initializer=system.die_with_parent)
                for _ in range(WORKERS)
            )
        self.pool = self.pools[number % WORKERS]
        self.later: asyncio.TimerHandle | None = None

    async def run(self, order: Order, progress: Any) -> None:
        """One order."""
        loop = asyncio.get_running_loop()
        if self.later:
            self.later.cancel()
        idle_in = await loop.run_in_executor(self.pool, _run, order)
        self.later = loop.call_later(
            idle_in or 0.0, lambda: loop.run_in_executor(self.pool, _idle, order.home)
        )

    async def stop(self) -> None:
        """Nothing runs on."""


def _agent(path: Path, engine: Any) -> Any:
    import msgspec

    from rankfleet.edge_agent.config import AgentConfig
    from rankfleet.edge_agent.machine import probe
    from rankfleet.edge_agent.service import Agent
    from rankfleet.edge_agent.trust import identity
    from rankfleet.federated.program.loader import load
    from rankfleet.federated.transport.mqtt import MqttBus

    config = load(path, AgentConfig)
    who = identity.load(config.home)
    link = config.link
    bus = MqttBus(
        link.broker or who.broker,
        f"rf-{who.fleet}-{who.device}",
        packet=link.packet_bytes,
        keepalive_s=link.keepalive_s,
    )
    return Agent(who, config, bus, engine, msgspec.to_builtins(probe.profile(config)), {})


async def _fleet(folder: Path) -> None:
    """Until SIGTERM; the worker processes end with it."""
    agents = [_agent(p, SharedEngine(n)) for n, p in enumerate(sorted(folder.glob("*.yaml")))]
    work = asyncio.ensure_future(asyncio.gather(*(a.run() for a in agents)))
    for name in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(name, work.cancel)
    try:
        with contextlib.suppress(asyncio.CancelledError):
            await work
    finally:
        for pool in SharedEngine.pools:
            for process in list((pool._processes or {}).values()):
                process.kill()
            pool.shutdown(wait=False, cancel_futures=True)


def main() -> None:
    """`run` or `fleet`."""
    parse = argparse.ArgumentParser()
    parse.add_argument("verb", choices=["run", "fleet"])
    parse.add_argument("where", type=Path)
    args = parse.parse_args()
    if args.verb == "fleet":
        asyncio.run(_fleet(args.where))
        return
    from rankfleet.edge_agent.cli import _serve
    from rankfleet.edge_agent.supervise.process import ProcessEngine

    asyncio.run(
        _serve(
            _agent(args.where, ProcessEngine(memory_mb=None, idle_s=300, module="benchmarks.noise_worker"))
        )
    )


if __name__ == "__main__":
    main()
