"""Real processes and a real Mosquitto, 200 faults over 30 rounds (SCALE=quick: 30 over 8): the result must
be that of a quiet run.

A third job, with the tuner, is run through faults too; what its ledger recorded must lead a fresh tuner to
the same arms.
"""

import asyncio
import os
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

from rankfleet.coordinator.broker.child import mosquitto
from tests.chaos.replay import replayed
from tests.chaos.run import Result, run

from .table import report

SIZES = {"quick": (8, 30, 4, 10), "full": (30, 200, 20, 60)}
"""Rounds and faults with fixed arms, and with the tuner."""
SEED = int(os.environ.get("SEED", "1"))
TUNED: dict[str, Any] = {
    "policy": {"name": "cost_ucb"}, "arms": {"ranks": [2, 4, 8], "bits": [32], "steps": [20, 40], "batch": 4},
}  # fmt: skip


def lost(quiet: Result, wild: Result) -> int:
    """Updates that the quiet run counted and this one did not."""
    return len({tuple(r) for r in quiet.ledger if r[3] == "counted"} - {tuple(r) for r in wild.ledger})


def double(result: Result) -> int:
    """Updates that went into more than one version."""
    return len(result.folded) - len({tuple(x) for x in result.folded})


async def measure(folder: Path, scale: str) -> dict[str, Any]:
    """Three runs: quiet, wild, and wild with the tuner."""
    from tests.world import tiny_bert

    model = tiny_bert(folder / "tiny")
    rounds, faults, tuned_rounds, tuned_faults = SIZES[scale]
    print(f"a quiet run of {rounds} rounds", flush=True)
    quiet = await run(folder / "quiet", model, SEED, rounds, 0)
    print(f"  {quiet.seconds:.0f} s; now {faults} faults, seed {SEED}", flush=True)
    wild = await run(folder / "wild", model, SEED, rounds, faults)
    print(
        f"  {wild.seconds:.0f} s; now with the tuner: {tuned_rounds} rounds, {tuned_faults} faults",
        flush=True,
    )
    tuned = await run(folder / "tuned", model, SEED + 1, tuned_rounds, tuned_faults, **TUNED)
    arms, same = replayed(folder / "tuned" / "coordinator", model)
    rows = [
        {"fault": k, "times": v, "with the tuner": tuned.faults.get(k, 0)}
        for k, v in sorted(wild.faults.items())
    ]
    facts = {
        "seed": SEED, "rounds": rounds, "faults": sum(wild.faults.values()), "updates": len(quiet.folded),
        "updates_lost": lost(quiet, wild),
        "updates_double": double(wild) + double(tuned), "adapter_identical": wild.versions == quiet.versions,
        "ledger_identical": wild.ledger == quiet.ledger,
        "longest_recovery_s": round(max(wild.recoveries, default=0.0), 1),
        "median_recovery_s": round(statistics.median(wild.recoveries or [0.0]), 1),
        "messages_touched": wild.messages,
        "seconds": {"quiet": round(quiet.seconds), "wild": round(wild.seconds),
        "tuned": round(tuned.seconds)},
        "tuner_arms": arms, "tuner_arms_chosen_again": same,
    }  # fmt: skip
    report("chaos", rows, **facts)
    other = [(a, b) for a, b in zip(quiet.ledger, wild.ledger, strict=False) if a != b]
    print("\n".join(f"  {row}" for row in [*wild.unusual, *other[:3]]))
    good = (
        not facts["updates_lost"]
        and not facts["updates_double"]
        and facts["adapter_identical"]
        and facts["ledger_identical"]
    )
    return {**facts, "good": good and arms == same and facts["faults"] == faults}


def main() -> int:
    """1 where something was lost, counted twice, or came out otherwise."""
    if mosquitto() is None:
        print("Mosquitto is not installed, so there is no chaos: apt install mosquitto")
        return 0
    # In memory: inodes must not be given out again, and what survives a power cut is decided by us, not by a
    # disk.
    memory = "/dev/shm" if Path("/dev/shm").is_dir() else None
    with tempfile.TemporaryDirectory(prefix="chaos-", dir=memory) as folder:
        return 0 if asyncio.run(measure(Path(folder), os.environ.get("SCALE", "full")))["good"] else 1


if __name__ == "__main__":
    sys.exit(main())
