"""What heads and channels are worth: the device's estimate against the dense formula, the fleet's average,
and a job that uses it."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from rankfleet.coordinator.jobs.plan import Plan
from rankfleet.coordinator.jobs.spec import read_job
from rankfleet.coordinator.planning import importance as channels
from rankfleet.coordinator.planning.planner import SCORE_ROUND, Planner
from rankfleet.coordinator.store import database, tables
from rankfleet.coordinator.store.versions import Registry
from rankfleet.edge_agent.model import Base, importance
from rankfleet.federated.contract.spec import Spec, coordinates
from rankfleet.federated.errors import WireError
from rankfleet.federated.wire.messages import read_assignment
from rankfleet.profiles.card import read_card

from .edge_agent.families import ENCODERS, make
from .edge_agent.test_families import adapted, batch
from .world import LABELS, World, job, rows


@pytest.mark.parametrize("family", ["bert", "llama", "gpt2"])
def test_scores_are_those_of_the_dense_formula(tmp_path: Path, family: str) -> None:
    folder = make(family, tmp_path / family)
    card, base = read_card(folder), Base(folder, [], 32, {}, family not in ENCODERS)
    adapted(base)
    parameters = base.parameters()
    rows_, layout = base.hidden(batch())
    grads = dict(
        zip(
            parameters,
            torch.autograd.grad(rows_[: layout.real].square().sum(), list(parameters.values())),
            strict=True,
        )
    )
    found = importance.scores(base, card, grads, [batch()])
    assert set(found) == {f"p/{kind}/{layer}" for kind in importance.KINDS for layer in range(card.layers)}

    def dense(name: str) -> torch.Tensor:
        s = base.sites[name]
        gradient = grads[f"{name}.B"] @ s.A.detach() + s.B.detach() @ grads[f"{name}.A"]
        return (gradient * (s.base.dense() + s.scale * s.B.detach() @ s.A.detach())).abs()

    layer = 1
    expected = torch.zeros(card.ffn)
    seen: dict[str, Any] = {}
    base.core.seen = seen
    with torch.no_grad():
        base.hidden(batch())
    base.core.seen = None
    for m in card.of_layer(layer):
        if m.role == "up":
            expected += dense(m.name).sum(1) / dense(m.name).sum(1).norm()
        if m.role == "down":
            expected += dense(m.name).sum(0) / dense(m.name).sum(0).norm()
            active = seen[m.name].sqrt() * base.sites[m.name].base.dense().norm(dim=0)
            expected += active / active.norm()
    assert (
        np.abs(
            found[f"p/channels/{layer}"].astype(int) - importance.packed(expected.numpy()).astype(int)
        ).max()
        <= 1
    )
    assert found[f"p/heads/{layer}"].shape == (card.groups,)
    assert found[f"p/heads/{layer}"].max() == 255


def test_what_matters_ranks_first(tmp_path: Path) -> None:
    """A channel that is read by nothing, and a head that is, get the lowest score whatever their weights
    are."""
    folder = make("llama", tmp_path / "m")
    card, base = read_card(folder), Base(folder, [], 32, {}, True)
    adapted(base)
    for m in card.of_layer(0):
        site = base.sites[m.name]
        if m.role in ("down", "o"):
            width = card.head_size * (card.heads // card.groups) if m.role == "o" else 1
            site.base.tensors = {"weight": site.base.tensors["weight"].clone()}
            site.base.tensors["weight"][:, :width] = 0
            site.A.data[:, :width] = 0
    parameters = base.parameters()
    losses, *_ = base.answers(batch())
    grads = dict(zip(parameters, torch.autograd.grad(losses.mean(), list(parameters.values())), strict=True))
    found = importance.scores(base, card, grads, [batch()])
    assert found["p/channels/0"].argmin() == 0
    assert found["p/heads/0"].argmin() == 0


def test_the_fleet_agrees_on_the_average(tiny: Path) -> None:
    card = read_card(tiny)
    old = channels.importance(tiny, card)
    one, two = (np.zeros(40, np.uint8) for _ in range(2))
    one[3], two[5] = 255, 255
    found = channels.agreed(
        card, old, [(3.0, {"p/channels/0": one}), (1.0, {"p/channels/0": two}), (9.0, {})]
    )
    assert found.channels[0][3] == pytest.approx(0.75)
    assert found.channels[0][5] == pytest.approx(0.25)
    assert np.array_equal(found.channels[1], old.channels[1])
    kept = channels.masks(card, found, 0.5)["encoder.layer.0.intermediate.dense.out"]
    assert {3, 5} <= set(kept.tolist())
    again = channels.restored(channels.saved(found))
    assert all(
        np.array_equal(a, b)
        for a, b in zip(
            channels.masks(card, again, 0.5).values(), channels.masks(card, found, 0.5).values(), strict=True
        )
    )
    for wrong in (np.zeros(41, np.uint8), np.zeros(40, np.float32)):
        with pytest.raises(WireError, match="is not 40 bytes"):
            channels.agreed(card, old, [(1.0, {"p/channels/0": wrong})])


async def test_a_job_prunes_by_what_its_devices_said(tmp_path: Path, tiny: Path) -> None:
    arms = {"ranks": [2], "prune": [0, 0.4], "bits": [32], "steps": [4], "batch": 8}
    async with World(tmp_path, tiny, devices=2) as world:
        name = await world.run(
            job(rounds=8, arms=arms, policy={"name": "fixed"}, adapter={"targets": ["all"]}), seconds=120
        )
        ledger = world.coordinator.ledger
        told = {
            r["round"]: database.read(r["telemetry"])["cost"]
            for r in ledger.rows(tables.assignments, job=name)
        }
        assert [n for n, cost in told.items() if "importance" in cost] == [SCORE_ROUND]
        last = max(v["number"] for v in ledger.rows(tables.versions, job=name))
        state = Registry(world.coordinator.config.home / "jobs" / name).load(last).state
    before, after = channels.importance(tiny, read_card(tiny)), channels.restored(state["importance"])
    assert not np.array_equal(np.argsort(before.channels[0]), np.argsort(after.channels[0]))
    assert all(v.max() <= 1.0 for v in after.channels.values())


@pytest.mark.parametrize("masks", ["global", "private"])
async def test_private_masks_follow_each_devices_own_data(tmp_path: Path, tiny: Path, masks: str) -> None:
    arms = {"ranks": [2], "prune": [0, 0.4], "bits": [32], "steps": [4], "batch": 8, "masks": masks}
    async with World(tmp_path, tiny, devices=2) as world:
        for number, path in enumerate(world.data.values()):  # two devices that see other words
            seen = [r for r in rows(400, 1) if (r["label"] in LABELS[:2]) == bool(number)]
            path.write_text("\n".join(json.dumps(r) for r in seen[:80]))
        name = await world.run(
            job(rounds=10, arms=arms, policy={"name": "fedspine"}, adapter={"targets": ["all"]}), seconds=120
        )
        ledger, runner = world.coordinator.ledger, world.coordinator
        told = [
            (r["round"], r["device"], read_assignment(r["body"]))
            for r in ledger.rows(tables.assignments, job=name)
        ]
        last = max(v["number"] for v in ledger.rows(tables.versions, job=name))
        state = Registry(runner.config.home / "jobs" / name).load(last).state
        assert ledger.row(tables.jobs, id=name)["state"] == "finished"
    cut = {d: a.blobs["masks"].digest for n, d, a in told if n > SCORE_ROUND and "masks" in a.blobs}
    assert len(set(cut.values())) == (
        len(cut) if masks == "private" else min(1, len(cut))
    )  # how many are cut depends on seconds
    assert ("own_importance" in state) == (masks == "private")
    plan = Plan(read_job(job(arms=arms, adapter={"targets": ["all"]})), read_card(tiny))
    planner = Planner("j", plan, tiny, Registry(tmp_path / "r"), None)  # type: ignore[arg-type]
    planner.rank(channels.restored(state["importance"]))
    planner.own = state.get("own_importance", {})
    one, two, stranger = (planner.masks(0.4, d) for d in ("d0", "d1", "d9"))
    differ = [k for k in one if not np.array_equal(one[k], two[k])]
    assert bool(differ) == (masks == "private")
    assert all(
        np.array_equal(stranger[k], m) for k, m in channels.masks(plan.card, planner.scores, 0.4).items()
    )
    assert planner.asks(SCORE_ROUND, "d9", 0.0)
    assert planner.asks(SCORE_ROUND + 4, "d9", 0.0) == (masks == "private")
    assert not planner.asks(SCORE_ROUND + 4, "d9", 0.4)
    assert not planner.asks(SCORE_ROUND + 4, "d0", 0.0) or masks == "global"


def test_a_cut_to_other_channels_is_another_lineage(tmp_path: Path, tiny: Path) -> None:
    """As many channels in another order would pass for the same coordinates, and error feedback would be
    added to the wrong ones."""
    card = read_card(tiny)
    plan = Plan(read_job(job(arms={"prune": [0, 0.4]}, adapter={"targets": ["all"]})), card)
    planner = Planner("j", plan, tiny, Registry(tmp_path / "r"), None)  # type: ignore[arg-type]
    version = planner.first_version(2)

    def lineages(ratio: float) -> dict[str, str]:
        masks = planner.masks(ratio, "d0")
        spec = Spec(
            {m.name: planner._cut(m, version.pairs[m.name], masks, "j/2")[0] for m in plan.modules}, {}
        )
        return coordinates(spec)

    whole, cut = lineages(0.0), lineages(0.4)
    assert {v.split(":")[0] for v in whole.values()} == {"j/2"}
    turned = {k: -t for k, t in planner.scores.channels.items()}
    planner.rank(channels.Importance(turned, planner.scores.heads))
    again = lineages(0.4)
    changed = {k.rpartition(".")[0] for k in cut if cut[k] != again[k]}
    assert changed == {m.name for layer in turned for side in card.channels(layer) for m in side}
    assert lineages(0.0) == whole
