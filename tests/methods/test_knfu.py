"""KnFu: whose predictions count for whom, the added loss, and devices that get better while the version
stays."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from rankfleet.coordinator.store import database, tables
from rankfleet.coordinator.store.versions import Registry
from rankfleet.edge_agent.worker.batches import split
from rankfleet.federated.methods.distillation.knfu import KnFu, shares
from tests.world import World, job, rows

from .test_by_hand import server, step, update


def test_shares_by_hand() -> None:
    # p = (.9, .1), (.9, .1), (.1, .9): KL between the kinds is .8·ln 9, so a far device has e^(-β·.8·ln 9) =
    # 9^(-.8β)
    predicted = np.array([[[0.9, 0.1]], [[0.9, 0.1]], [[0.1, 0.9]]])
    far = 9**-0.8
    assert np.allclose(shares(predicted, 1.0)[0], np.array([1, 1, far]) / (2 + far), atol=1e-5)
    assert np.allclose(shares(predicted, 0.0), 1 / 3)
    assert shares(predicted, 10.0)[0, :2].sum() > 0.99
    assert shares(predicted, 10.0)[2, 2] > 0.99


def told(device: str, *predicted: list[float]) -> Any:
    return update(device, {}, extra={"knfu": {"predicted": np.array(predicted, np.float16)}})


def test_reduce_fuses_for_all_that_were_ever_heard() -> None:
    m, ctx, memory = KnFu(texts=("a",), beta=0.0), server(), {}
    ctx.of = lambda device: memory.setdefault(device, {})
    assert m.reduce([told("d0", [1.0, 0.0]), told("d1", [0.0, 1.0])], ctx) == {}
    assert memory["d0"]["fused"].tolist() == [[0.5, 0.5]]
    m.reduce(
        [told("d2", [0.0, 1.0]), told("d3", [1.0, 0.0], [1.0, 0.0]), update("d4", {})], ctx
    )  # d3 speaks of other texts
    assert np.allclose(memory["d0"]["fused"], [[1 / 3, 2 / 3]])
    assert ctx.state["devices"] == ["d0", "d1", "d2"]
    assert m.offer({}, "d0", ctx) == {}
    assert np.allclose(ctx.down["fused"], [[1 / 3, 2 / 3]])
    fresh = server()
    fresh.of = lambda device: {}
    m.offer({}, "d9", fresh)
    assert not fresh.down


def context(scores: Any, **kw: Any) -> Any:
    return step(
        scores=lambda params, batch: scores[batch["labels"]],
        encode=lambda rows: [int(r["text"]) for r in rows],
        collate=lambda examples: {"labels": torch.tensor(examples)},
        generator=torch.Generator().manual_seed(0), split=split, **kw,
    )  # fmt: skip


def test_the_loss_is_a_divergence_by_hand() -> None:
    # f = softmax(0, 0) = (½, ½), F = (¾, ¼): KL = ¾·ln 1.5 + ¼·ln ½; λT² = 2·4
    m = KnFu(texts=("0", "1"), weight=2.0, heat=2.0)
    ctx = context(torch.zeros(2, 2), down={"fused": torch.tensor([[0.75, 0.25], [0.75, 0.25]])})
    got = m.loss(torch.tensor(1.0), {}, {"labels": torch.zeros(5)}, ctx)
    assert float(got) == pytest.approx(1 + 8 * (0.75 * math.log(1.5) + 0.25 * math.log(0.5)), rel=1e-5)
    ctx.down = {}
    assert float(m.loss(torch.tensor(1.0), {}, {}, ctx)) == 1.0


def test_a_text_is_compared_with_its_own_target() -> None:
    scores = torch.tensor([[3.0, 0.0], [0.0, 3.0], [1.0, 0.0]])
    m = KnFu(texts=("0", "1", "2"))
    ctx = context(scores, down={"fused": scores.softmax(-1)})
    for size in (1, 2, 3):
        assert float(m.loss(torch.tensor(0.0), {}, {"labels": torch.zeros(size)}, ctx)) == pytest.approx(
            0.0, abs=1e-6
        )
    predicted = m.trained({}, ctx)["predicted"]
    assert predicted.dtype == np.float16
    assert np.allclose(predicted, scores.softmax(-1), atol=1e-3)
    assert KnFu().trained({}, ctx) == {}


async def test_devices_get_better_and_no_weight_leaves(tmp_path: Path, tiny: Path) -> None:
    public = [r["text"] for r in rows(8, seed=99)]
    arms = {"ranks": [2], "bits": [32], "steps": [12], "batch": 8}
    training = {"lr": 0.03, "evaluate": 16, "probe": 4}
    async with World(tmp_path, tiny, devices=2) as world:
        name = await world.run(
            job(stack=[{"knfu": {"texts": public}}], rounds=4, arms=arms, training=training)
        )
        registry = Registry(world.coordinator.config.home / "jobs" / name)
        first, last = registry.load(0), registry.load(4)
        assert all(
            np.array_equal(p.B, last.pairs[m].B) and np.array_equal(p.A, last.pairs[m].A)
            for m, p in first.pairs.items()
        )
        assert all(np.array_equal(t, last.dense[k]) for k, t in first.dense.items())
        reports = [
            database.read(r["telemetry"])
            for r in world.coordinator.ledger.rows(tables.assignments, job=name, round=3)
        ]
        for report in reports:
            own, arrived = report["personal"], report["held"]
            assert own["loss"] < arrived["loss"]
        memory = [p.name for p in (world.coordinator.config.home / "jobs" / name).rglob("d?@*")]
        assert {n[:2] for n in memory} == {"d0", "d1"}
