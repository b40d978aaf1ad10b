"""How a benchmark reports: a table for people, JSON for everything else."""

import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rankfleet.federated.program.cli import table

OUT = Path(__file__).parent / "out"


def interleaved(work: dict[str, Callable[[], object]], repeats: int = 7) -> dict[str, float]:
    """Median seconds of each piece of work, run in turn, so that a noisy neighbour meets all of them."""
    times: dict[str, list[float]] = {k: [] for k in work}
    for _ in range(repeats):
        for name, run in work.items():
            start = time.perf_counter()
            run()
            times[name].append(time.perf_counter() - start)
    return {k: statistics.median(t) for k, t in times.items()}


def report(name: str, rows: list[dict[str, Any]], **facts: Any) -> None:
    """Print and write."""
    OUT.mkdir(exist_ok=True)
    facts = {"machine": platform.machine(), "python": platform.python_version(), **facts}
    (OUT / f"{name}.json").write_text(json.dumps({**facts, "rows": rows}, indent=1), encoding="utf-8")
    print(f"\n{name}: {', '.join(f'{k} {v}' for k, v in facts.items())}\n{table(rows)}")
