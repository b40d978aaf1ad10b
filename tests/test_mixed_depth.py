"""A fleet of mixed depth keeps what lies below every arm for the whole job."""

from pathlib import Path
from typing import Any

from rankfleet.coordinator.jobs.plan import Plan
from rankfleet.coordinator.jobs.spec import read_job
from rankfleet.coordinator.store import database, tables
from rankfleet.profiles.card import read_card

from . import world as small
from .world import World, job

DEEP = {"targets": ["query", "value"], "max_depth": 2}


def test_the_floor_is_below_every_arm(tmp_path: Path) -> None:
    card = read_card(small.tiny_bert(tmp_path, layers=4))

    def floor(**arms: Any) -> int:
        text = job(adapter=DEEP, arms={"ranks": [2], "bits": [32], **arms})
        return Plan(read_job(text), card).floor

    assert floor() == 2
    assert floor(depths=[1]) == 3
    assert floor(placements=["rising(1..3, total=9)"]) == 1


async def test_a_device_of_changing_depth_keeps_the_common_layers(tmp_path: Path) -> None:
    model = small.tiny_bert(tmp_path / "model", layers=4)
    async with World(tmp_path / "w", model, devices=2) as world:
        name = await world.run(
            job(rounds=6, adapter=DEEP, frozen_every=1, policy={"name": "ucb1"},
                arms={"ranks": [2], "depths": [1, 2], "bits": [32], "steps": [6], "batch": 8})
        )  # fmt: skip
        told = [
            database.read(r["telemetry"])
            for r in world.coordinator.ledger.rows(tables.assignments, job=name)
            if r["round"] < 6
        ]
    # With frozen layers that come anew each round, a shallow arm's own boundary pays only within the round;
    # the fleet's for the job.
    assert all(t["cache"] in ("layers below 2", "layers below 3") for t in told)
    assert sum(t["cache"] == "layers below 2" for t in told) >= 6
