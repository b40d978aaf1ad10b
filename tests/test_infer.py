"""`edge-agent infer`: the current adapter, a whole export and an ONNX export say the same."""

import asyncio
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors.numpy import load_file, save_file

from rankfleet.coordinator.export import write
from rankfleet.edge_agent import cli
from rankfleet.edge_agent.config import AgentConfig
from rankfleet.edge_agent.infer import rows_of, runtime
from rankfleet.federated.errors import ConfigError
from rankfleet.federated.wire.messages import Task

from . import world as small
from .world import World, job, questions, rows


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory, tiny: Path) -> Any:
    """Homes after a job: (a device's configuration, the coordinator's, the job)."""

    async def made() -> Any:
        async with World(tmp_path_factory.mktemp("fleet"), tiny, devices=2) as world:
            name = await world.run(job(rounds=3))
            return next(iter(world.agents.values()))[0].config, world.coordinator.config, name

    return asyncio.run(made())


@pytest.mark.parametrize("kind", ["adapter", "peft", "merged", "onnx"])
def test_every_form_says_the_same(fleet: Any, tmp_path: Path, kind: str) -> None:
    agent, coordinator, name = fleet
    texts = [{"text": r["text"]} for r in rows(30, 7)]
    expected = runtime(agent, None).answers(texts)
    assert len({a["label"] for a in expected}) > 1
    if kind != "adapter":
        write(coordinator, name, tmp_path / kind, kind=kind)
    found = runtime(agent, None if kind == "adapter" else tmp_path / kind)
    answers = found.answers(texts)
    assert [a["label"] for a in answers] == [a["label"] for a in expected]
    for ours, theirs in zip(answers, expected, strict=True):
        assert ours["shares"] == pytest.approx(theirs["shares"], abs=0.01)
    assert set(answers[0]["shares"]) <= set(found.task.labels)


def test_the_program_reads_arguments_and_lines(
    fleet: Any, tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    agent, _, _ = fleet
    (tmp_path / "agent.yaml").write_text(json.dumps({"state_dir": str(agent.home), "models": agent.models}))
    assert cli.main(["infer", "red", "cat dog", "--json", "--config", str(tmp_path / "agent.yaml")]) == 0
    by_argument = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    monkeypatch.setattr("sys.stdin", iter(["red\n", "\n", '{"text": "cat dog"}\n']))
    assert cli.main(["infer", "--json", "--config", str(tmp_path / "agent.yaml")]) == 0
    assert [json.loads(line) for line in capsys.readouterr().out.splitlines()] == by_argument
    assert cli.main(["infer", "red", "--config", str(tmp_path / "agent.yaml")]) == 0
    assert "%" in capsys.readouterr().out


async def test_a_causal_model_answers(tmp_path: Path) -> None:
    model = small.tiny_llama(tmp_path / "model")
    world = World(tmp_path / "w", model, devices=2, task="causal_lm")
    for n, path in enumerate(world.data.values()):
        path.write_text("\n".join(json.dumps(q) for q in questions(40, n)))
    async with world:
        name = await world.run(
            job(
                task={"dataset": "words", "kind": "causal_lm", "max_length": 24}, rounds=2,
                policy={"name": "ucb1"},
                arms={"ranks": [2], "placements": ["rising(0..1, total=4)"], "bits": [32], "steps": [4],
                "batch": 8},
            )
        )  # fmt: skip
        agent, coordinator = next(iter(world.agents.values()))[0].config, world.coordinator.config
    write(coordinator, name, tmp_path / "whole", kind="merged")
    asked = rows_of(runtime(agent, None).task, ["red", "sun moon"])
    said = runtime(agent, None).answers(asked)
    assert all(isinstance(a["answer"], str) for a in said)
    assert said == runtime(agent, tmp_path / "whole").answers(asked)


def test_what_is_missing_is_said(fleet: Any, tmp_path: Path) -> None:
    agent, _, _ = fleet
    with pytest.raises(ConfigError, match="no tuned model"):
        runtime(AgentConfig(state_dir=str(tmp_path)), None)
    shutil.copytree((agent.home / "adapter" / "current").resolve(), tmp_path / "a")
    with pytest.raises(ConfigError, match="not on this device"):
        runtime(AgentConfig(state_dir=str(tmp_path)), tmp_path / "a")
    with pytest.raises(ConfigError, match="no `text`"):
        rows_of(Task("d", "text_classification"), ['{"label": "x"}'])
    assert rows_of(Task("d", "text_classification"), ["{not json"]) == [{"text": "{not json"}]
    other = small.tiny_bert(tmp_path / "other")
    weights = load_file(other / "model.safetensors")
    weights["encoder.layer.0.attention.self.query.weight"] = weights[
        "encoder.layer.0.attention.self.query.weight"
    ][:, :8].copy()
    save_file(weights, other / "model.safetensors")
    models = {name: str(other) for name in agent.models}
    with pytest.raises(ConfigError, match="belongs to another base model"):
        runtime(AgentConfig(state_dir=str(tmp_path), models=models), tmp_path / "a")
    (tmp_path / "a" / "model.onnx").write_bytes(b"no model")
    shutil.copy(other / "tokenizer.json", tmp_path / "a")
    with pytest.raises(ConfigError, match=r"model\.onnx cannot be read"):
        runtime(agent, tmp_path / "a")
    (tmp_path / "a" / "task.json").write_text("{")
    with pytest.raises(ConfigError, match="no tuned model"):
        runtime(agent, tmp_path / "a")
