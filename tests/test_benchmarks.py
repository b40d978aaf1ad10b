"""Benchmarks fail when they measure nothing, and end what they start."""

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from benchmarks import overhead, table

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize(
    ("rows", "reason"),
    [
        ([], "there are no rows"),
        ([{"figure": "a", "value": "n/a"}], "no row holds a number"),
        ([{"figure": "a", "value": 1.0}, {"figure": "b", "value": float("nan")}], "`value` is not finite"),
        ([{"figure": "a", "value": 1.0}, {"figure": "b", "value": None}], "`b` could not be measured"),
        ([{"ok": True}], "no row holds a number"),
        ([{"figure": "a", "value": 1.0}], ""),
    ],
)
def test_what_is_no_measurement_fails(
    rows: list[dict[str, Any]], reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(table, "OUT", tmp_path)
    assert table.problem(rows) == reason
    if reason:
        with pytest.raises(SystemExit, match=reason):
            table.report("x", rows)
    else:
        table.report("x", rows)
    assert json.loads((tmp_path / "x.json").read_text())["rows"] is not None


def test_programs_end_with_all_that_they_started() -> None:
    inner = "subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(100)'])"
    child = f"import subprocess, sys, time; {inner}; time.sleep(100)"
    process = subprocess.Popen([sys.executable, "-c", child])
    me = psutil.Process(process.pid)
    while not (children := me.children(recursive=True)):
        time.sleep(0.02)
    overhead.end([process])
    assert process.poll() is not None
    assert not any(c.is_running() and c.status() != psutil.STATUS_ZOMBIE for c in children)


def test_every_benchmark_runs_at_quick_scale_in_ci() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    line = next(x for x in makefile.splitlines() if "for file in benchmarks/*.py" in x)
    quoted = ("overhead", "link", "deploy", "device", "memory", "start", "codec", "aggregate", "dst", "chaos")
    left_out = {p for p in quoted if f"*/{p}.py" in line}
    assert not left_out
    assert "ci: test bench" in makefile
