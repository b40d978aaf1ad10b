"""A bad link: 1 Mbit/s, 300 ms, a stall of two seconds every twenty, a cut every minute; one real agent
behind it.

`make bench-link` writes benchmarks/out/link.json. Bytes are counted on the wire, at the relay. Training is
noise (benchmarks/ noise.py) and, for `overhead_fraction`, a pause of 60 s. SCALE=quick: one round of each,
a pause of 5 s.
"""

import argparse
import asyncio
import contextlib
import os
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

import yaml

from .overhead import Bench
from .slow_link import SlowLink
from .table import report

RATE, DELAY, STALL_EVERY, STALL, CUT_EVERY = 1e6, 0.15, 20.0, 2.0, 60.0
HEADERS = 2 * (40 + 40)
"""TCP and IP headers with their acknowledgements, for one exchange of two small packets."""
MONTH_S = 30 * 86_400


class LinkBench(Bench):
    """One agent, connected through a relay."""

    def __init__(self, home: Path, stack: list[str], relay: SlowLink, **options: Any) -> None:
        super().__init__(home, 1, "auto", stack, **options)
        self.relay = relay

    def prepare(self, path: Path) -> None:
        """Put the relay into the agent's YAML."""
        broker = self.client.get("/health")["broker"]
        self.relay.target = ("127.0.0.1", int(broker.rsplit(":", 1)[1]))
        config = yaml.safe_load(path.read_text())
        config["link"] = {"broker": f"mqtt://127.0.0.1:{self.relay.port}", "answer_s": 5, **self.link}
        path.write_text(yaml.safe_dump(config))


def _relay(**changes: float) -> SlowLink:
    usual = {"rate": RATE, "delay": DELAY, "stall_every": STALL_EVERY, "stall": STALL, "cut_every": CUT_EVERY}
    return SlowLink(("127.0.0.1", 0), **{**usual, **changes})


async def transfer(home: Path, rounds: int = 4) -> dict[str, float]:
    """Dense rounds of 1.3 MB each way, one after the other, for two minutes and more: how much of the link
    is used, how much repeated."""
    async with _relay() as relay:
        with contextlib.ExitStack() as stack:
            bench = await asyncio.to_thread(stack.enter_context, LinkBench(home, [], relay))
            job = await asyncio.to_thread(bench.job, rounds + 2)
            await _until(lambda: len(bench.closed(job)) >= 1)
            before, start, up, down = len(bench.closed(job)), time.time(), relay.up, relay.down
            await _until(lambda: len(bench.closed(job)) >= before + rounds)
            took, up, down = time.time() - start, relay.up - up, relay.down - down
            blob = _blob_bytes(bench, job)
            done = len(bench.closed(job)) - before
    useful = done * blob
    # The device sends while it does not receive and the other way round, so one direction's rate is what
    # there is to use.
    open_share = 1 - STALL / STALL_EVERY
    return {
        "goodput_fraction": 2 * useful * 8 / (RATE * open_share * took),
        "repeated_fraction": (up + down) / (2 * useful) - 1,
        "repeated_fraction_up": up / useful - 1,
        "repeated_fraction_down": down / useful - 1,
        "cuts": relay.cuts,
        "round_s": took / done,
        "update_mb": blob / 1e6,
    }


def _blob_bytes(bench: Bench, job: str) -> float:
    import sqlite3

    from rankfleet.federated.wire.messages import read_assignment

    with contextlib.closing(sqlite3.connect(bench.home / "c" / "ledger.db")) as ledger:
        body = ledger.execute(
            "select body from assignments where job = ? order by round limit 1", (job,)
        ).fetchone()[0]
    return float(read_assignment(body).blobs["view"].size)


async def overhead(
    home: Path, targets: list[str], rounds: int = 2, training_s: float = 60.0
) -> dict[str, float]:
    """Share of a round beside its `training_s` of training, sparse uploads."""
    os.environ["RANKFLEET_NOISE_S"] = str(training_s)
    try:
        async with _relay() as relay:
            with contextlib.ExitStack() as stack:
                bench = await asyncio.to_thread(stack.enter_context, LinkBench(home, ["sparse"], relay))
                bench.adapter = {"targets": targets}
                job = await asyncio.to_thread(bench.job, rounds + 1)
                await _until(lambda: len(bench.closed(job)) >= rounds + 1, 600)
                times = [t for t, _ in bench.closed(job)]
    finally:
        del os.environ["RANKFLEET_NOISE_S"]
    return {"overhead_fraction": (times[-1] - times[0]) / rounds / training_s - 1}


async def idle(home: Path, seconds: float = 130.0) -> dict[str, float]:
    """Traffic of a connected agent without work, at a keepalive of 30 s, brought to the default one."""
    async with _relay(cut_every=0) as relay:
        with contextlib.ExitStack() as stack:
            bench = LinkBench(home, [], relay)
            bench.link = {"keepalive_s": 30}
            await asyncio.to_thread(stack.enter_context, bench)
            await asyncio.sleep(5)
            before = relay.up + relay.down
            await asyncio.sleep(seconds)
            payload = relay.up + relay.down - before
    from rankfleet.edge_agent.config import Link

    exchanges = payload / 4
    per_month = MONTH_S / Link().keepalive_s
    return {
        "idle_payload_mb_a_month": exchanges * 4 / seconds * 30 / Link().keepalive_s * MONTH_S / 1e6,
        "idle_mb_a_month": per_month * (4 + HEADERS) / 1e6,
        "pings_seen": exchanges,
    }


async def _until(done: Any, seconds: float = 500.0) -> None:
    end = time.time() + seconds
    while not await asyncio.to_thread(done):
        if time.time() > end:
            raise RuntimeError("it did not happen in time")
        await asyncio.sleep(0.2)


def main() -> None:
    """All figures, or those named."""
    parse = argparse.ArgumentParser(description=__doc__)
    parse.add_argument("--only", nargs="*", default=[])
    args = parse.parse_args()
    home = Path(tempfile.mkdtemp(prefix="rankfleet-link-"))
    work: dict[str, Any] = {
        "transfer": lambda h: transfer(h),
        "overhead": lambda h: overhead(h, ["auto"]),
        "overhead_all_maps": lambda h: overhead(h, ["all"]),
        "idle": lambda h: idle(h),
    }
    if os.environ.get("SCALE") == "quick":
        work = {
            "transfer": lambda h: transfer(h, 1),
            "overhead": lambda h: overhead(h, ["auto"], 1, 5.0),
            "idle": lambda h: idle(h, 35.0),
        }
    found: dict[str, float] = {}
    for name, run in work.items():
        if args.only and name not in args.only:
            continue
        (home / name).mkdir()
        figures = asyncio.run(run(home / name))
        found |= {
            (k if name in ("transfer", "overhead", "idle") else f"{k}_all_maps"): round(v, 4)
            for k, v in figures.items()
        }
        print(name, figures, flush=True)
    shutil.rmtree(home, ignore_errors=True)
    report("link", [{"figure": k, "value": v} for k, v in found.items()], **found)


if __name__ == "__main__":
    main()
