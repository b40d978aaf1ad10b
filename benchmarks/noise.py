"""Agents that do everything but train: each round adds a slice of a seeded noise table to the adapter.

    python -m benchmarks.noise run agent.yaml     one real agent with a worker process of its own
    python -m benchmarks.noise fleet FOLDER       one coroutine for each `FOLDER/*.yaml`, in this process

Identity, signatures, codecs, outbox, fsync, receipts: the code that is shipped. Only `Trainer` and the base model are replaced.
"""

import argparse
import asyncio
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from edge_agent.order import Order


class InlineEngine:
    """The worker's code in this process, in two threads, so that one may compute while the other waits for the disk."""

    pool = ThreadPoolExecutor(2)

    cards: dict[str, Any] = {}

    def __init__(self) -> None:
        from .noise_worker import NoiseWorker

        self.worker = NoiseWorker()
        self.worker._cards = self.cards
        self.later: asyncio.TimerHandle | None = None

    async def run(self, order: Order, progress: Any) -> None:
        """One order."""
        loop = asyncio.get_running_loop()
        if self.later:
            self.later.cancel()
        await loop.run_in_executor(self.pool, self.worker.run, order, lambda told: None)
        self.later = loop.call_later(self.worker.idle_in() or 0.0, lambda: loop.run_in_executor(self.pool, self.worker.idle))

    async def stop(self) -> None:
        """Nothing runs on."""


def _agent(path: Path, engine: Any) -> Any:
    import msgspec

    from edge_agent import identity, probe
    from edge_agent.config import AgentConfig
    from edge_agent.service import Agent
    from federated.loader import load
    from federated.mqtt import MqttBus

    config = load(path, AgentConfig)
    who = identity.load(config.home)
    link = config.link
    bus = MqttBus(link.broker or who.broker, f"rf-{who.fleet}-{who.device}", packet=link.packet_bytes, keepalive_s=link.keepalive_s)
    return Agent(who, config, bus, engine, msgspec.to_builtins(probe.profile(config)), {})


async def _fleet(folder: Path) -> None:
    await asyncio.gather(*(_agent(p, InlineEngine()).run() for p in sorted(folder.glob("*.yaml"))))


def main() -> None:
    """`run` or `fleet`."""
    parse = argparse.ArgumentParser()
    parse.add_argument("verb", choices=["run", "fleet"])
    parse.add_argument("where", type=Path)
    args = parse.parse_args()
    if args.verb == "fleet":
        asyncio.run(_fleet(args.where))
        return
    from edge_agent.cli import _serve
    from edge_agent.engine import ProcessEngine

    asyncio.run(_serve(_agent(args.where, ProcessEngine(memory_mb=None, idle_s=300, module="benchmarks.noise_worker"))))


if __name__ == "__main__":
    main()
