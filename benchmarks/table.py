"""How a benchmark reports: a table for people, JSON for everything else."""

import json
import math
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


def problem(rows: list[dict[str, Any]]) -> str:
    """Why rows are no measurement; empty if they are: there are some, with numbers, none of them NaN or
    infinite, none missing."""
    if not rows:
        return "there are no rows"
    numbers = [
        (k, v)
        for row in rows
        for k, v in row.items()
        if isinstance(v, int | float) and not isinstance(v, bool)
    ]
    if not numbers:
        return "no row holds a number"
    if bad := [k for k, v in numbers if not math.isfinite(v)]:
        return f"`{bad[0]}` is not finite"
    missing = [str(row.get("figure", "?")) for row in rows if "value" in row and row["value"] is None]
    return f"`{missing[0]}` could not be measured" if missing else ""


def report(name: str, rows: list[dict[str, Any]], **facts: Any) -> None:
    """Print and write. Exits with 1 where nothing, or not everything, was measured; what there is is
    written all the same."""
    OUT.mkdir(exist_ok=True)
    facts = {"machine": platform.machine(), "python": platform.python_version(), **facts}
    (OUT / f"{name}.json").write_text(json.dumps({**facts, "rows": rows}, indent=1), encoding="utf-8")
    print(f"\n{name}: {', '.join(f'{k} {v}' for k, v in facts.items())}\n{table(rows)}")
    if reason := problem(rows):
        raise SystemExit(f"benchmark `{name}` failed: {reason}")
