"""The quickstart's job as printed, with ranks, depths and cuts that change: no device crashes."""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from rankfleet.coordinator.store import tables

from .world import LABELS, World, tiny_bert

PAGE = Path(__file__).parent.parent / "docs" / "quickstart.md"


def printed_job() -> dict[str, Any]:
    block = re.search(r"## job\.yaml\n\n```yaml\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    assert block
    job: dict[str, Any] = yaml.safe_load(block[1])
    return job


@pytest.mark.slow
@pytest.mark.parametrize("policy", ["cost_ucb", "ucb1"])
async def test_the_quickstarts_job_runs_on_devices_whose_arms_change(tmp_path: Path, policy: str) -> None:
    """Its stack, arms and quorum; on a small model and data of our own. `ucb1` tries arm after arm."""
    job = printed_job()
    job |= {
        "model": "tiny",
        "rounds": 12,
        "policy": {"name": policy},
        "training": {"lr": 0.01, "evaluate": 8, "probe": 4},
    }
    job["task"] |= {"dataset": "words", "labels": LABELS}
    job["arms"] |= {"bits": [32], "steps": [2, 3], "ranks": [2, 4], "depths": [1, 2, 3]}
    job["adapter"] = {"max_depth": 3}
    async with World(tmp_path, tiny_bert(tmp_path / "model", layers=4)) as world:
        name = await world.run(yaml.safe_dump(job), seconds=200)
        rows = world.coordinator.ledger.rows(tables.assignments, job=name)
        trained = [r for r in rows if r["round"] < 12]
        assert {(r["state"], r["reason"]) for r in trained} <= {("counted", ""), ("late", "")}, (
            "a device failed"
        )
        assert len({r["arm"] for r in trained}) >= (6 if policy == "ucb1" else 1)
