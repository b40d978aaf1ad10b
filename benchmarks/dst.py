"""Deterministic simulation: thousands of runs of a whole fleet with faults by seed, and planted defects
that must be found.

python -m benchmarks.dst                 SCALE=quick: 200 seeds, else 3,000
python -m benchmarks.dst --seed 27       that run alone, twice, with what it did
"""

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

from tests.simulation import run as simulation
from tests.simulation.defects import DEFECTS
from tests.simulation.run import FAULTS, ROUNDS, Outcome, simulate

from .table import report

SEEDS = {"quick": 200, "full": 3000}
TRIES = {"quick": 120, "full": 300}
"""Seeds in which a planted defect must show; the rarest shows in one of fourteen."""
STUCK_S = 900.0
"""Virtual seconds after which a run with a planted defect counts as stuck; the sound ones take about 120."""


def same(outcome: Outcome, clean: Outcome) -> bool:
    """Did everything hold, and is the result that of the run without faults?"""
    return not outcome.wrong and outcome.ledger == clean.ledger and outcome.versions == clean.versions


def one(work: tuple[int, Path]) -> Outcome:
    """A seed."""
    return simulate(work[0], work[1])


def hunt(work: tuple[str, Path, Outcome, int]) -> tuple[str, int | None, str]:
    """The first seed that shows a defect."""
    name, model, clean, tries = work
    simulation.LIMIT_S = STUCK_S
    for seed in range(tries):
        with DEFECTS[name]():
            outcome = simulate(seed, model)
        if not same(outcome, clean):
            return name, seed, outcome.wrong[0] if outcome.wrong else "another result than without faults"
    return name, None, ""


def run(model: Path, scale: str) -> bool:
    """The whole benchmark; False where a seed failed or a defect was not found."""
    started, clean = time.perf_counter(), simulate(-1, model, faults=0)
    print(f"{SEEDS[scale]} seeds of {ROUNDS} rounds and {FAULTS} faults", flush=True)
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        outcomes = list(
            _shown(pool.map(one, [(s, model) for s in range(SEEDS[scale])], chunksize=4), SEEDS[scale])
        )
        took = time.perf_counter() - started
        hunted = list(pool.map(hunt, [(n, model, clean, TRIES[scale]) for n in DEFECTS]))
    failed = [o for o in outcomes if not same(o, clean)]
    kinds = sum((Counter(o.faults) for o in outcomes), Counter())
    rows: list[dict[str, Any]] = [
        {"guard that was taken away": n, "found by seed": s, "shows as": text[:80]} for n, s, text in hunted
    ]
    report(
        "dst", rows, seeds=len(outcomes), rounds=ROUNDS, faults=sum(kinds.values()),
        faults_by_kind=dict(kinds),
        failed_seeds=[o.seed for o in failed], defects=len(rows),
        defects_found=sum(s is not None for _, s, _ in hunted),
        virtual_s_median=round(statistics.median(o.virtual_s for o in outcomes)),
        virtual_s_most=round(max(o.virtual_s for o in outcomes)),
        seeds_per_s=round(len(outcomes) / took, 2),
    )  # fmt: skip
    for o in failed[:5]:
        print(f"seed {o.seed}: {o.wrong[:3]}\n  alone: python -m benchmarks.dst --seed {o.seed}")
    return not failed and all(s is not None for _, s, _ in hunted)


def _shown(outcomes: Iterator[Outcome], total: int) -> Iterator[Outcome]:
    for number, outcome in enumerate(outcomes, 1):
        if number % 100 == 0 or number == total:
            print(f"  {number} of {total}", flush=True)
        yield outcome


def alone(seed: int, model: Path) -> bool:
    """One seed, with what went wrong."""
    clean, first, again = simulate(-1, model, faults=0), simulate(seed, model), simulate(seed, model)
    print(
        f"seed {seed}: {first.faults}\n  {first.virtual_s:.1f} virtual seconds; the same again: "
        f"{first == again}"
    )
    print(
        "\n".join(f"  wrong: {w}" for w in first.wrong)
        or f"  nothing is wrong; as without faults: {same(first, clean)}"
    )
    return same(first, clean) and first == again


def main() -> int:
    """Run; hash seeds are fixed, so that sets have one order everywhere."""
    if os.environ.get("PYTHONHASHSEED") != "0":
        os.execve(
            sys.executable,
            [sys.executable, "-m", "benchmarks.dst", *sys.argv[1:]],
            {**os.environ, "PYTHONHASHSEED": "0"},
        )
    parse = argparse.ArgumentParser(
        prog="python -m benchmarks.dst", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parse.add_argument("--seed", type=int)
    args = parse.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        from tests.world import tiny_bert

        model = tiny_bert(Path(folder) / "tiny")
        good = run(model, os.environ.get("SCALE", "full")) if args.seed is None else alone(args.seed, model)
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
