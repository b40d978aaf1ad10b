"""Hooks that no shipped method uses are called all the same, at their place and with what the contract
promises."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rankfleet.coordinator.export import load
from rankfleet.coordinator.store import database, tables
from rankfleet.federated.contract import catalogue
from rankfleet.federated.wire.messages import read_assignment

from . import every_hook
from .world import World, job


@pytest.fixture(autouse=True)
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(catalogue.modules(), "every_hook", "tests.every_hook")
    every_hook.CALLED.clear()


@pytest.mark.parametrize("space", ["product", "factors"])
async def test_every_hook_is_called(tmp_path: Path, tiny: Path, space: str) -> None:
    async with World(tmp_path, tiny, devices=2) as world:
        name = await world.run(
            job(
                rounds=2,
                stack=["every_hook"],
                space=space,
                arms={"ranks": [4], "bits": [32], "steps": [5], "batch": 4},
            )
        )
        assert set(every_hook.CALLED) == {"plan", "attach", "batch", "objective", "step"}
        rows = world.coordinator.ledger.rows(tables.assignments, job=name, round=0)
        for row in rows:
            recipe = read_assignment(row["body"]).recipe
            assert (recipe.steps, recipe.lr) == (1, 0.005)
            assert database.read(row["telemetry"])["steps"] == 1
        last, first = (load(world.coordinator.config, name, n)[0] for n in (2, 0))
        assert np.array_equal(last.dense["head.bias"], first.dense["head.bias"])
        assert not np.array_equal(last.dense["head.weight"], first.dense["head.weight"])


async def test_what_stays_at_home_is_kept_and_used(
    tmp_path: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import rankfleet.edge_agent.worker.local_round
    from rankfleet.federated.wire.frame import thaw

    states, real = [], rankfleet.edge_agent.worker.local_round.commit

    def commit(result: Path, update: bytes, state: bytes, meta: Any) -> None:
        if "/d0/" in str(result):
            states.append(thaw(state)["\0kept"]["head.bias"])
        real(result, update, state, meta)

    monkeypatch.setattr(rankfleet.edge_agent.worker.local_round, "commit", commit)
    async with World(tmp_path, tiny, devices=2) as world:
        await world.run(
            job(rounds=3, stack=["every_hook"], arms={"ranks": [2], "bits": [32], "steps": [5], "batch": 4})
        )
        assert np.any(states[0] != 0)
        assert np.any(states[1] != states[0])


async def test_unsupported_methods_of_third_parties_are_refused_by_name(tmp_path: Path, tiny: Path) -> None:
    entry = next(e for e in catalogue.entries() if e.name == "every_hook")
    assert set(entry.hooks) == {"plan", "travels", "attach", "batch", "objective", "step"}
