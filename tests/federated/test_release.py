"""Beside a release nothing else tells of training examples: not the report, not what methods look at, and
the tuner copes."""

import math
import random
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest

from rankfleet.bandit.arms import Arm
from rankfleet.bandit.policies import policy_class
from rankfleet.bandit.policy import Member, Outcome, Priced
from rankfleet.bandit.reward import rate
from rankfleet.coordinator.rounds import verdict
from rankfleet.coordinator.store import database, tables
from rankfleet.federated.contract.catalogue import build_stack
from rankfleet.federated.contract.contexts import ClientContext, StepContext
from rankfleet.federated.contract.method import Method
from rankfleet.federated.contract.stack import Stack
from rankfleet.federated.contract.tensors import Tensors
from rankfleet.federated.errors import Conflict
from tests.foreign import register
from tests.world import World, job

ALLOWED = {"version", "bits", "cache", "held", "samples", "steps", "examples", "cost"}
SUMS = {"loss", "square", "correct", "count"}
ARMS = {"ranks": [2, 4], "bits": [32], "steps": [2], "batch": 4, "prune": [0, 0.4]}


def told(world: World, name: str) -> list[dict[str, Any]]:
    return [
        database.read(r["telemetry"]) for r in world.coordinator.ledger.rows(tables.assignments, job=name)
    ]


@pytest.mark.parametrize("policy", ["cost_ucb", "ucb1", "fedspine"])
async def test_a_report_says_nothing_of_training_examples(tmp_path: Path, tiny: Path, policy: str) -> None:
    """Five rounds: the fourth asks for the importance of channels."""
    async with World(tmp_path, tiny, devices=2) as world:
        name = await world.run(job(stack=["dp_lora"], rounds=5, arms=ARMS, policy={"name": policy}))
        reports = told(world, name)
        assert len(reports) == 2 * 6  # five rounds and the installation
        for report in reports:
            assert set(report) <= ALLOWED
            assert set(report["held"]) == SUMS
        plain = await world.run(job(name="plain", rounds=1, arms={**ARMS, "prune": [0]}))
        assert {"loss_before", "loss_after", "skipped"} <= set(told(world, plain)[0])
        rounds = world.coordinator.ledger.rows(tables.rounds, job=name)
        assert all(database.read(r["info"])["loss"] is None for r in rounds if r["number"] < 5)


async def test_channels_are_scored_without_a_release_alone(
    tmp_path: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from rankfleet.edge_agent.worker import local_round

    scored: list[bool] = []
    real = local_round.importance.scores
    monkeypatch.setattr(local_round.importance, "scores", lambda *a: scored.append(True) or real(*a))  # type: ignore[func-returns-value]
    async with World(tmp_path, tiny, devices=1) as world:
        await world.run(job(stack=["dp_lora"], rounds=4, arms=ARMS))
        assert not scored
        await world.run(job(name="plain", rounds=4, arms=ARMS))
        assert scored


async def test_a_personal_model_is_not_measured_beside_a_release(tmp_path: Path, tiny: Path) -> None:
    async with World(tmp_path, tiny, devices=1) as world:
        name = await world.run(job(stack=["ditto", "dp_lora"], rounds=2))
        assert not any("personal" in t for t in told(world, name))


async def test_an_owners_release_counts_too(tmp_path: Path, tiny: Path) -> None:
    async with World(tmp_path, tiny, devices=1) as world:
        await world.kill_agent("d0")
        world.agent_changes["d0"] = {"require": ("dp_lora",)}
        await world.start_agent("d0")
        name = await world.run(job(rounds=2))
        assert all(set(t) <= ALLOWED for t in told(world, name))


class Counts(Method, frozen=True):
    """Label counts beside the update, as fedgen sends them."""

    tells: ClassVar[Any] = "private"

    def trained(self, params: Any, ctx: StepContext) -> Tensors:
        """How many examples of each label."""
        return {"labels": np.bincount([int(e["label"]) for e in ctx.examples])}


class Unsaid(Counts, frozen=True):
    """The same, and does not say so."""

    tells: ClassVar[Any] = ""

    def trained(self, params: Any, ctx: StepContext) -> Tensors:
        """As above."""
        return {}


class Said(Unsaid, frozen=True):
    """Nothing of examples."""

    tells: ClassVar[Any] = "public"


@pytest.mark.parametrize("first", ["counts", "unsaid", "power_of_choice", "scaffold", "just_one_byte"])
def test_what_tells_of_examples_is_refused_with_both_names(
    first: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if kind := {"counts": Counts, "unsaid": Unsaid}.get(first):
        register(monkeypatch, first, kind)
    with pytest.raises(Conflict, match=f"`{first}` tells .* that `dp_lora` has made private"):
        Stack(build_stack([first, "dp_lora"]))
    with pytest.raises(Conflict, match=rf"`{first}`.*`dp_lora`"):
        Stack(build_stack(["dp_lora", first]))


def test_who_says_that_it_tells_nothing_may_look(monkeypatch: pytest.MonkeyPatch) -> None:
    register(monkeypatch, "said", Said)
    assert Stack(build_stack(["said", "dp_lora"])).releases


class Along(Method, frozen=True):
    """Something in `ctx.up`, and no word of what it is made of."""

    def send(self, delta: Tensors, ctx: ClientContext) -> Tensors:
        """The number of tensors."""
        ctx.up["count"] = np.array([len(delta)])
        return delta


async def test_what_is_sent_along_unsaid_stops_the_round(
    tmp_path: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    register(monkeypatch, "along", Along)
    async with World(tmp_path, tiny, devices=1) as world:
        await world.run(job(stack=["along"], rounds=1))
        name = world.coordinator.jobs.submit(job(name="private", stack=["along", "dp_lora"], rounds=1))

        def reasons() -> list[str]:
            return [
                r["reason"]
                for r in world.coordinator.ledger.rows(tables.assignments, job=name)
                if r["reason"]
            ]

        await world.until(lambda: bool(reasons()))
        assert (
            "method `along`, hook `send`: sends `count` along with an update that was made private"
            in reasons()[0]
        )
        monkeypatch.setattr(Along, "tells", "public")
        await world.run(job(name="said", stack=["along", "dp_lora"], rounds=1))


def row(state: str, **report: Any) -> dict[str, Any]:
    arm = {"placement": "top1:2", "bits": 32, "steps": 2, "batch": 4, "prune": 0.0}
    return {
        "device": "d",
        "state": state,
        "telemetry": database.text(report),
        "arm": database.text(arm),
        "seconds": 2.0,
    }


def test_what_is_not_told_is_unknown_and_what_failed_or_diverged_is_not() -> None:
    silent = verdict.outcome(row("counted"), "k")
    assert (silent.loss_before, silent.loss_after, silent.drop, silent.unknown) == (None, None, None, True)
    assert rate(silent) == 0.0
    good = verdict.outcome(row("counted", loss_before=2.0, loss_after=1.5), "k")
    assert (good.drop, good.unknown, rate(good)) == (0.5, False, pytest.approx(0.125))
    assert not verdict.outcome(row("failed", code="crash"), "k").unknown
    diverged = verdict.outcome(row("counted", loss_before=2.0, loss_after=None), "k")
    assert math.isnan(diverged.drop or 0.0)
    assert not diverged.unknown
    assert verdict.summary([{**row("counted"), "state": "counted"}])["loss"] is None


@pytest.mark.parametrize("policy", ["cost_ucb", "ucb1", "fedspine", "fixed"])
def test_policies_learn_nothing_from_what_is_unknown(policy: str) -> None:
    """The same state as if nobody had been there, and the same choices; a known outcome moves it."""
    arms = [Priced(Arm(placement=f"top1:{r}", steps=2, batch=4), r, 1, 1.0 + r, 10.0, r / 10) for r in (2, 4)]
    members = [Member("d", "k", 1.0, arms)]

    def state(*outcomes: Outcome) -> Any:
        chosen: dict[str, Any] = {}
        made = policy_class(policy)()
        made.choose(members, chosen, 1, random.Random(0))
        made.observe(list(outcomes), chosen)
        return {k: v for k, v in chosen.items() if k != "top"}

    def leaves(s: Any) -> Any:
        return {k: v["leaves"] if isinstance(v, dict) and "leaves" in v else v for k, v in s.items()}

    arm = arms[0].arm
    assert leaves(state(Outcome("d", "k", arm, None, None, 3.0))) == leaves(state())
    if policy != "fixed":
        assert leaves(state(Outcome("d", "k", arm, 2.0, 1.0, 3.0))) != leaves(state())
        assert leaves(state(Outcome("d", "k", arm, None, None, 3.0, failed="crash"))) != leaves(state())
