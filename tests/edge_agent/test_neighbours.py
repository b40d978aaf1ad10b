"""Jobs that follow each other in one worker, and what applications get of methods that are no plain pairs."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from rankfleet.coordinator.store import database, tables
from rankfleet.edge_agent.infer import runtime
from rankfleet.federated.contract import catalogue
from rankfleet.federated.errors import ConfigError
from rankfleet.federated.wire.messages import read_assignment
from rankfleet.profiles.card import read_card
from rankfleet.profiles.memory import step_plan
from tests.world import World, job

ARMS = {"ranks": [2], "bits": [32], "steps": [3], "batch": 4}
TRAINING = {"lr": 0.01, "evaluate": 6, "probe": 2}


@pytest.fixture(autouse=True)
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(catalogue.modules(), "served", "tests.edge_agent.served")


def text(stack: list[Any], **changes: Any) -> str:
    return job(**{"stack": stack, "rounds": 2, "arms": ARMS, "training": TRAINING, **changes})


def sites(world: World) -> Any:
    engine: Any = world.agents["d0"][0].engine
    return engine.worker._base[1].sites


async def second(home: Path, tiny: Path, first: list[Any]) -> str:
    """Digest of a plain job that follows another."""
    async with World(home, tiny, devices=1) as world:
        await world.run(text(first, space="factors"))
        assert all(s.A is None and s.carry is None for s in sites(world).values())
        return world.digest(await world.run(text([], name="second", space="factors")))


async def test_a_job_leaves_nothing_behind_for_the_next(tmp_path: Path, tiny: Path) -> None:
    alone = await second(tmp_path / "plain", tiny, [])
    others: list[Any] = [
        {"served": {"carries": True}},
        "ssf",
        {"prefix": {"deep": True}},
        "partial_pfl",
        "apfl",
        "just_one_byte",
    ]
    for number, first in enumerate(others):
        assert await second(tmp_path / str(number), tiny, [first]) == alone, first


async def test_what_devices_serve_is_measured_beside_what_arrived(tmp_path: Path, tiny: Path) -> None:
    async with World(tmp_path, tiny, devices=1) as world:
        name = await world.run(text(["served"]))
        plain = await world.run(text([], name="plain"))
        rows = world.coordinator.ledger.rows(tables.assignments, job=name)
        for row in rows:
            told = database.read(row["telemetry"])
            assert told["personal"]["loss"] == pytest.approx(
                told["personal"]["count"] * math.log(4), rel=1e-5
            )
            assert told["held"]["loss"] != told["personal"]["loss"]
        assert all(
            "personal" not in database.read(r["telemetry"])
            for r in world.coordinator.ledger.rows(tables.assignments, job=plain)
        )


async def test_a_kept_part_is_measured_with_what_arrived(tmp_path: Path, tiny: Path) -> None:
    """What the device serves is its own head on the shared part as it arrived, not the head that nobody
    trains."""
    async with World(tmp_path, tiny, devices=2) as world:
        name = await world.run(text(["partial_pfl"], rounds=4, arms={**ARMS, "steps": [8]}))
        rows = world.coordinator.ledger.rows(tables.assignments, job=name, round=3)
        told = [database.read(r["telemetry"]) for r in rows]
        assert sum(t["personal"]["loss"] for t in told) < sum(t["held"]["loss"] for t in told)
        heads = [
            load_file(tmp_path / d / "adapter" / "current" / "head.safetensors")["head.weight"]
            for d in world.names
        ]
        assert not np.array_equal(*heads)


async def test_a_carry_is_applied_and_published_as_further_rank(tmp_path: Path, tiny: Path) -> None:
    async with World(tmp_path, tiny, devices=1) as world:
        await world.run(text([{"served": {"carries": True}}]))
        folder = tmp_path / "d0" / "adapter" / "current"
        weights = load_file(folder / "adapter_model.safetensors")
        scale = json.loads((folder / "adapter_config.json").read_text())["lora_alpha"] / 3
        for name, b in weights.items():
            if name.endswith("lora_B.weight"):
                a = weights[name.replace("lora_B", "lora_A")]
                assert b.shape[1] == 3
                assert np.allclose(scale * b[:, 2:] @ a[2:], 0.1)


@pytest.mark.parametrize("method", ["ssf", "prefix"])
async def test_infer_answers_with_what_methods_attach(tmp_path: Path, tiny: Path, method: str) -> None:
    async with World(tmp_path, tiny, devices=1) as world:
        await world.run(text([method], rounds=3, arms={**ARMS, "steps": [8]}))
        config = world.agent_config("d0")
        rows = [{"text": "red green blue red green blue"}, {"text": "cat dog bird cat dog bird"}]
        run: Any = runtime(config, None)
        answers = run.answers(rows)
        run.base.clear()
        assert run.answers(rows) != answers
        await world.run(text([], name="plain"))
        assert "attach" not in json.loads((tmp_path / "d0" / "adapter" / "current" / "task.json").read_text())


async def test_the_loops_knobs_reach_the_device(tmp_path: Path, tiny: Path) -> None:
    async with World(tmp_path, tiny, devices=1) as world:
        for changes, stack, knobs in (
            ({"clip": 0.5, "warmup": 0.0}, [], ("adamw", 0.5, 0.0)),
            ({"optimizer": "sgd"}, [], ("sgd", 1.0, 0.1)),
            ({}, ["apfl"], ("sgd", 0.0, 0.0)),
        ):
            name = await world.run(text(stack, rounds=1, training={**TRAINING, **changes}))
            row = world.coordinator.ledger.rows(tables.assignments, job=name, round=0)[0]
            recipe = read_assignment(row["body"]).recipe
            assert (recipe.optimizer, recipe.clip, recipe.warmup) == knobs
        with pytest.raises(ConfigError, match="`apfl` needs the gradient to be the step"):
            world.coordinator.jobs.submit(text(["apfl"], training={**TRAINING, "optimizer": "adamw"}))


async def test_dp_and_byte_jobs_run(tmp_path: Path, tiny: Path) -> None:
    async with World(tmp_path, tiny, devices=2) as world:
        for stack in (["dp_lora"], ["just_one_byte"]):
            name = await world.run(text(stack, rounds=2))
            assert (
                len({str(v["digest"]) for v in world.coordinator.ledger.rows(tables.versions, job=name)}) == 3
            )


async def test_pruning_is_refused_where_methods_need_whole_maps(tmp_path: Path, tiny: Path) -> None:
    async with World(tmp_path, tiny, devices=1) as world:
        with pytest.raises(ConfigError, match="`ssf` works on whole maps"):
            world.coordinator.jobs.submit(text(["ssf"], arms={**ARMS, "prune": [0.4]}))


def test_the_plan_of_a_step_knows_that_attached_functions_run_once(tiny: Path) -> None:
    card, length, batch = read_card(tiny), 16, 64
    placement = {m.name: 1 for m in card.modules}
    lean, fast = (
        step_plan(card, placement, 0.0, 32, batch, length, 68, 0.0, again).memory_mb
        for again in (True, False)
    )
    assert lean < fast
