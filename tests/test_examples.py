"""Every example is a job that is valid for its kind of model, and the agent's YAML names its datasets."""

import json
from pathlib import Path

import pytest

from rankfleet.coordinator.jobs.plan import Plan
from rankfleet.coordinator.jobs.spec import read_job_file
from rankfleet.edge_agent.config import AgentConfig
from rankfleet.federated.program.loader import load
from rankfleet.profiles.card import ModelCard, Module, read_card

FOLDER = Path(__file__).parent.parent / "examples"
JOBS = sorted(p for p in FOLDER.glob("*.yaml") if p.name != "agent.yaml")
LAYERS = {"Qwen2.5-0.5B-Instruct": 24, "SmolLM2-135M": 30, "Llama-3.2-1B": 16}


def card(name: str, tiny: Path) -> ModelCard:
    """The shapes of the example's model, as far as the job asks for them."""
    if name not in LAYERS:
        return read_card(tiny)
    ends = (
        "self_attn.q_proj",
        "self_attn.k_proj",
        "self_attn.v_proj",
        "self_attn.o_proj",
        "mlp.up_proj",
        "mlp.down_proj",
    )
    modules = [
        Module(f"model.layers.{n}.{e}", n, 64, 64, "attention") for n in range(LAYERS[name]) for e in ends
    ]
    return ModelCard(name, "00", "llama", LAYERS[name], 64, 128, 4, 512, 1000, modules, True)


@pytest.mark.parametrize("path", JOBS, ids=lambda p: p.name)
def test_examples_are_valid(path: Path, tiny: Path) -> None:
    spec = read_job_file(path)
    plan = Plan(spec, card(spec.model, tiny))
    assert plan.modules
    assert path.read_text().splitlines()[0] == f"# coordinator submit examples/{path.name}"
    assert f"`{path.name}`" in (FOLDER / "README.md").read_text()


def test_the_agents_side_names_what_the_jobs_ask_for() -> None:
    config = load(FOLDER / "agent.yaml", AgentConfig)
    for path in JOBS:
        spec = read_job_file(path)
        if spec.task.kind == "causal_lm":
            assert config.datasets[spec.task.dataset].task == "causal_lm"
            assert spec.model in config.models
    assert json.dumps(sorted(config.datasets)) == '["answers", "conversations"]'
