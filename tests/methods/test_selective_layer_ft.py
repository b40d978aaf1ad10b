"""Selective layers: the choice against brute force, what is told, and what a job trains."""

from itertools import combinations, product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from rankfleet.coordinator.store.versions import Registry
from rankfleet.federated.contract.contexts import Round
from rankfleet.federated.methods.placements.selective_layer_ft import SelectiveLayerFt, by_layer, choose
from tests.world import World, job

from .test_by_hand import RNG, server, step, update

MAPS = {f"l{n}.{side}": SimpleNamespace(layer=n) for n in range(3) for side in "qv"}


def worth(m: Any, gains: Any, agree: float) -> float:
    """P1 as it is written."""
    apart = sum(((m[i] - m[j]) ** 2).sum() for i in range(len(m)) for j in range(i))
    return float((m * gains).sum() - agree * apart)


def test_equals_brute_force_in_nearly_all_small_instances() -> None:
    sets = [c for n in (1, 2) for c in combinations(range(5), n)]
    equal = 0
    for seed, agree in product(range(8), (0.0, 0.05, 0.3)):
        gains = RNG(seed).random((3, 5))
        best = max(
            worth(np.array([[float(j in c) for j in range(5)] for c in pick]), gains, agree)
            for pick in product(sets, repeat=3)
        )
        got = worth(choose(gains, 2, agree).astype(float), gains, agree)
        assert got <= best + 1e-9
        equal += got >= best - 1e-9
    assert equal >= 20  # of 24: going round device by device ends in a corner now and then


def test_lambda_leads_from_everybody_for_himself_to_one_choice_for_all() -> None:
    gains = np.array([[1.0, 0.9, 0.0], [0.0, 0.9, 1.0]])
    assert choose(gains, 1, 0.0).tolist() == [[True, False, False], [False, False, True]]
    assert choose(gains, 2, 0.0).tolist() == [[True, True, False], [False, True, True]]
    gains = RNG(0).random((6, 4))
    distinct = [len({tuple(row) for row in choose(gains, 1, agree)}) for agree in (0.0, 0.05, 10.0)]
    assert distinct == sorted(distinct, reverse=True)
    assert distinct[0] > 1 == distinct[-1]


def test_nobody_gets_a_layer_that_he_does_not_hold() -> None:
    assert by_layer({"a": 2.0, "b": 3.0}, {"a": 1, "b": 1}, 3).tolist() == [-np.inf, 5.0, -np.inf]
    gains = np.array([[1.0, -np.inf], [1.0, -np.inf], [-np.inf, 0.1]])
    for agree in (0.0, 5.0):
        assert choose(gains, 1, agree).tolist() == [[True, False], [True, False], [False, True]]


def test_what_is_told_is_the_squared_norm_of_each_map() -> None:
    grads = {"l0.q.A": torch.tensor([1.0, 2.0]), "l0.q.B": torch.tensor([2.0]), "l1.q.A": torch.tensor([3.0])}
    ctx = step(
        round=Round(4, 9),
        batches=lambda: iter([{}]),
        gradient=lambda params, batch: (0.0, {k: grads[k] for k in params}),
    )
    told = SelectiveLayerFt(every=2).arrived({**grads, "head.bias": torch.ones(1)}, ctx)
    assert {k: t.tolist() for k, t in told.items()} == {"l0.q": [9.0], "l1.q": [9.0]}
    ctx.round = Round(5, 9)
    assert SelectiveLayerFt(every=2).arrived(grads, ctx) == {}


def told(device: str, **norms: float) -> Any:
    return update(
        device,
        {},
        extra={
            "selective_layer_ft": {k.replace("_", "."): np.array([n], np.float32) for k, n in norms.items()}
        },
    )


def test_step_chooses_and_plan_places() -> None:
    m, ctx = SelectiveLayerFt(every=5), server()
    ctx.maps = MAPS
    ctx.updates = [told("d0", l0_q=1.0, l0_v=2.0, l1_q=2.5), told("d1", l2_q=1.0, l1_v=0.5), told("d2")]
    change = {"l0.q.A": np.ones(1)}
    assert m.step(change, ctx) is change
    assert {d: c.tolist() for d, c in ctx.state["chosen"].items()} == {"d0": [0], "d1": [2]}
    ask: Any = {"placement": dict.fromkeys(MAPS, 2), "rank": 2, "steps": 4, "lr": 0.1}
    assert m.plan(ask, "d0", ctx) == {**ask, "placement": {"l0.q": 2, "l0.v": 2}}
    assert m.plan(ask, "d2", ctx) == ask  # told nothing
    assert m.plan({**ask, "placement": {"l1.q": 2}}, "d0", ctx)["placement"] == {
        "l1.q": 2
    }  # its arm holds none of its layers any more
    ctx.round = Round(5, 9)
    assert m.plan(ask, "d0", ctx) == ask
    # Who is late is chosen for beside those who are known.
    ctx.updates = [told("d2", l1_q=1.0)]
    m.step(change, ctx)
    assert {d: c.tolist() for d, c in ctx.state["chosen"].items()} == {"d0": [0], "d1": [2], "d2": [1]}
    ctx.state["chosen"] = "as it was"
    ctx.updates = [told("d0")]
    m.step(change, ctx)
    assert ctx.state["chosen"] == "as it was"


@pytest.mark.parametrize("agree", [0.0, 10.0])
async def test_a_job_trains_the_chosen_layer_alone(tmp_path: Path, tiny: Path, agree: float) -> None:
    async with World(tmp_path, tiny, devices=2) as world:
        name = await world.run(
            job(stack=[{"selective_layer_ft": {"every": 4, "agree": agree}}], rounds=4, space="factors")
        )
        registry = Registry(world.coordinator.config.home / "jobs" / name)
        first, last = registry.load(1), registry.load(4)
        moved = {m: not np.array_equal(p.B, last.pairs[m].B) for m, p in first.pairs.items()}
        layers = {int(m.split("layer.")[1].split(".")[0]) for m, yes in moved.items() if yes}
        chosen = {
            n for c in last.state["methods"]["selective_layer_ft"]["chosen"].values() for n in c.tolist()
        }
        assert layers == chosen
        assert len(chosen) == 1 or not agree
