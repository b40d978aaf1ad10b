"""The quickstart's job, as its page prints it: the first one that anybody runs."""

import json
import random
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

from rankfleet.bandit.policy import Choice
from rankfleet.bandit.tuner import Tuner
from rankfleet.coordinator.broker.child import mosquitto
from rankfleet.coordinator.store import database, tables
from rankfleet.coordinator.store.ledger import Ledger
from rankfleet.edge_agent.config import Dataset

from .test_programs import Programs
from .world import World, rows, tiny_bert

PAGE = Path(__file__).parent.parent / "docs" / "quickstart.md"
TEAMS = {"colour": "it", "sky": "hr", "animal": "sales"}


def printed(heading: str) -> str:
    """The first YAML block under a heading."""
    found = re.search(
        rf"^## {re.escape(heading)}\n.*?^```yaml\n(.*?)^```",
        PAGE.read_text(encoding="utf-8"),
        re.MULTILINE | re.DOTALL,
    )
    assert found, f"{PAGE.name} has no YAML under `{heading}`"
    return found.group(1)


def tickets(seed: int) -> str:
    """Lines of JSON with a text and the team that it is for."""
    return "\n".join(
        json.dumps({**r, "label": TEAMS[r["label"]]}) for r in rows(90, seed, seed) if r["label"] in TEAMS
    )


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Layers and heads as the page's model has them, few channels: a tenth less is one head less."""
    return tiny_bert(
        tmp_path_factory.mktemp("small"),
        layers=6,
        hidden_size=48,
        num_attention_heads=12,
        intermediate_size=96,
    )


def shortened() -> str:
    """The page's job, twelve rounds long."""
    text, count = re.subn(r"(?m)^rounds: \d+", "rounds: 12", printed("job.yaml"))
    assert count == 1
    return text


def problems(assignments: Iterable[Mapping[str, Any]]) -> list[tuple[int, str, str]]:
    """Round, device and reason of all that did not go well."""
    return [
        (r["round"], r["device"], r["reason"])
        for r in assignments
        if r["state"] not in ("counted", "received")
    ]


def configured(programs: Programs, model: Path) -> None:
    """Both sides know the page's model, and each device has tickets."""
    name = yaml.safe_load(printed("job.yaml"))["model"]
    for i, path in enumerate([programs.config, *programs.agents.values()]):
        config = yaml.safe_load(path.read_text())
        config["models"] = {name: str(model)}
        if path != programs.config:
            (data := path.with_suffix(".jsonl")).write_text(tickets(i))
            config["datasets"] = {"tickets": {"path": str(data)}}
        path.write_text(yaml.safe_dump(config))


@pytest.mark.slow
def test_the_job_as_printed(tmp_path: Path, small: Path) -> None:
    """Real processes over a real broker, with the policy that the page leaves to be the default."""
    (tmp_path / "job.yaml").write_text(shortened())
    programs = Programs(tmp_path, small, "mosquitto" if mosquitto() else "amqtt")
    configured(programs, small)
    try:
        programs.begin()
        programs.coordinator("submit", str(tmp_path / "job.yaml"))
        programs.until(lambda: programs.json("jobs")[0]["state"] in ("finished", "failed"), 200)
        assert programs.json("jobs")[0]["state"] == "finished", programs.json("jobs")
    finally:
        programs.stop()
    ledger = Ledger(f"sqlite:///{tmp_path / 'c' / 'ledger.db'}")
    assignments = ledger.answers("tickets-1")
    ledger.close()
    assert not problems(assignments)
    assert {r["round"] for r in assignments} == set(range(13))


@pytest.mark.slow
async def test_every_depth_and_cut_that_the_job_offers(
    tmp_path: Path, small: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Arms by lot in place of the policy, whose choice depends on seconds."""

    def by_lot(self: Tuner, number: int, devices: list[tuple[str, Any, float]]) -> dict[str, Choice]:
        lots = {d: random.Random(f"{number} {d}") for d, _, _ in devices}
        return {
            d: Choice(lots[d].choice([a.arm for a in self.feasible(d, p, number)]), "by lot")
            for d, p, _ in devices
        }

    monkeypatch.setattr(Tuner, "choose", by_lot)
    text = shortened()
    job = yaml.safe_load(text)
    world = World(tmp_path, small, devices=3)
    for i, name in enumerate(world.names):
        (path := tmp_path / f"{name}-tickets.jsonl").write_text(tickets(i))
        world.agent_changes[name] = {
            "datasets": {"tickets": Dataset(str(path))},
            "models": {job["model"]: str(small)},
        }
    async with world:
        world.coordinator.config.models[job["model"]] = str(small)
        name = await world.run(text, seconds=200)
        assignments = world.coordinator.ledger.rows(tables.assignments, job=name)
    assert not problems(assignments)
    arms = [database.read(r["arm"]) for r in assignments]
    assert {(a["placement"][:5], a["prune"]) for a in arms} == {
        (f"top({d}", p) for d in (1, 2, 3) for p in (0.0, 0.1, 0.2)
    }
