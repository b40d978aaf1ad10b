"""A device alone, which the demo's figures are compared with: the same engine, on arms that change."""

import json
from pathlib import Path

import pytest

from demo.baselines import local_accuracy
from rankfleet.coordinator.jobs.spec import read_job
from rankfleet.profiles.card import read_card

from .world import job, rows, tiny_bert


@pytest.mark.parametrize("prune", [0.0, 0.4])
def test_a_device_alone_learns_on_arms_that_change(tmp_path: Path, prune: float) -> None:
    """Depth 3, then 1, then 2: layers below the arm's arrive frozen and take part all the same."""
    model = tiny_bert(tmp_path / "bert", layers=3)
    card = read_card(model)
    (tmp_path / "d0.jsonl").write_text("\n".join(json.dumps(r) for r in rows(120, seed=1)))
    spec = read_job(job(adapter={"targets": ["all"], "max_depth": 3}, training={"lr": 0.02}))
    arms = [
        {"placement": f"top({depth}, r=2)", "prune": cut, "bits": 32, "batch": 8, "steps": 30}
        for depth, cut in ((3, 0.0), (1, prune), (2, prune))
    ]
    before, after = (
        local_accuracy(
            str(model), (spec, card), str(tmp_path / "d0.jsonl"), arms[:count], rows(80, seed=2), 1
        )
        for count in (1, 3)
    )
    assert after >= before
    assert after > 0.5  # a fourth by chance
