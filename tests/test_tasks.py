"""Causal language models and regression: what is learnt, what is cut, what the fleet makes of it."""

import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from rankfleet.coordinator.jobs.plan import Plan
from rankfleet.coordinator.jobs.spec import read_job
from rankfleet.coordinator.store import database, tables
from rankfleet.edge_agent.model import Base
from rankfleet.edge_agent.tasks import engine
from rankfleet.edge_agent.tasks.causal_lm import IGNORED
from rankfleet.federated.errors import ConfigError, Refused
from rankfleet.federated.wire.messages import Task
from rankfleet.profiles.card import read_card

from . import world as small
from .world import World, job, questions


@pytest.fixture(scope="session", params=["llama", "gpt2"])
def causal(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small.tiny_llama(tmp_path_factory.mktemp(request.param), request.param)


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small.tiny_llama(tmp_path_factory.mktemp("llama"))


def lm(folder: Path, **options: Any) -> Any:
    return engine(Task("words", "causal_lm", **{"max_length": 24, **options}), str(folder))


def words(task: Any, ids: Any) -> str:
    tokenizer = task.tokens.rich
    return " ".join(
        tokenizer.convert_ids_to_tokens(list(ids))
        if tokenizer
        else (task.tokens.plain.id_to_token(i) for i in ids)
    )


def test_only_the_answer_is_learnt(llama: Path) -> None:
    task = lm(llama)
    both = task.encode(
        [
            {"instruction": "red sun", "output": "moon"},
            {"instruction": "cat", "input": "dog", "output": "bird tree"},
        ]
    )
    assert words(task, both[0]["ids"]) == "Instruction : red sun Answer : moon [SEP]"
    assert words(task, both[1]["ids"]) == "Instruction : cat Input : dog Answer : bird tree [SEP]"
    batch = task.collate(both)
    learnt = [words(task, i[y != IGNORED]) for i, y in zip(batch["input_ids"], batch["labels"], strict=True)]
    assert learnt == ["moon [SEP]", "bird tree [SEP]"]


def test_braces_in_a_row_are_text(llama: Path) -> None:
    task = lm(llama, template="{instruction} | {input} {other}")
    assert (
        task.prompt({"instruction": "a {input}", "input": "{instruction}"})
        == "a {input} | {instruction} {other}"
    )


def test_long_prompts_lose_their_beginning_and_long_answers_their_end(llama: Path) -> None:
    task = lm(llama, max_length=10)
    (long_prompt,) = task.encode([{"instruction": "red " * 30, "output": "moon"}])
    assert words(task, long_prompt["ids"]).endswith("red Answer : moon [SEP]")
    assert len(long_prompt["ids"]) == 10
    (long_answer,) = task.encode([{"instruction": "red", "output": "moon " * 30}])
    assert sum(long_answer["learnt"]) == 5
    assert task.encode([{"instruction": "red", "output": " "}]) == []
    assert task.skipped == 1


def test_every_assistant_turn_of_a_conversation_is_learnt(llama: Path) -> None:
    task = lm(llama, template="chat")
    said = [("user", "red"), ("assistant", "sun"), ("user", "blue"), ("assistant", "moon star")]
    (found,) = task.encode([{"messages": [{"role": r, "content": c} for r, c in said]}])
    assert (
        words(task, [i for i, y in zip(found["ids"], found["learnt"], strict=True) if y])
        == "sun [SEP] moon star [SEP]"
    )
    with pytest.raises(Refused, match="not a list of"):
        task.encode([{"messages": "hello"}])


def test_chat_needs_a_template(tiny: Path) -> None:
    with pytest.raises(Refused, match="needs a tokenizer with a chat template"):
        lm(tiny, template="chat")


def test_losses_equal_the_models_own(causal: Path) -> None:
    """Against transformers' own loss, which sees full logits."""
    from transformers import AutoModelForCausalLM

    task = lm(causal)
    batch = task.collate(task.encode(questions(6, 0)))
    base = Base(causal, [], 32, {}, causal=True)
    plain = AutoModelForCausalLM.from_pretrained(causal).eval()
    with torch.inference_mode():
        ours = task.losses(task.forward(base, {}, batch), batch)
        for n in range(6):
            one = {k: t[n : n + 1] for k, t in batch.items()}
            assert float(ours[n]) == pytest.approx(float(plain(**one).loss), abs=1e-5)


async def test_a_fleet_learns_to_answer(tmp_path: Path, causal: Path) -> None:
    world = World(tmp_path, causal, devices=2, task="causal_lm")
    for n, path in enumerate(world.data.values()):
        path.write_text("\n".join(json.dumps(q) for q in questions(120, n)))
    task = {"dataset": "words", "kind": "causal_lm", "max_length": 24, "samples": ["red green", "sun blue"]}
    text = job(
        task=task, rounds=6, stack=["sparse"],
        adapter={"targets": ["all"], "max_depth": 2}, training={"lr": 0.05, "evaluate": 24, "probe": 4},
        arms={"ranks": [8], "depths": [2], "bits": [32], "steps": [12], "batch": 16},
    )  # fmt: skip
    async with world:
        name = await world.run(text)
        rows = world.coordinator.ledger.rows(tables.versions, job=name)
        told = [
            database.read(r["telemetry"]) for r in world.coordinator.ledger.rows(tables.assignments, job=name)
        ]
    measured = [database.read(r["metrics"]) for r in rows]
    assert measured[-1]["loss"] < 0.6 * measured[0]["loss"]
    assert measured[-1]["accuracy"] > measured[0]["accuracy"] + 0.3
    assert all(len(t["samples"]) == 2 for t in (told[0], told[-1]))
    assert all("samples" not in t for t in told[2:-2])


@pytest.mark.shared
async def test_a_real_model_on_real_instructions(tmp_path: Path, shared: Path) -> None:
    with gzip.open(shared / "data" / "dolly15k" / "train.jsonl.gz", "rt", encoding="utf-8") as lines:
        found = [json.loads(next(lines)) for _ in range(240)]
    model = shared / "models" / "stories260k"
    world = World(tmp_path, model, devices=2, packet=50_000, task="causal_lm")
    for n, path in enumerate(world.data.values()):
        path.write_text("\n".join(json.dumps(r) for r in found[n::2]))
    text = job(
        task={"dataset": "words", "kind": "causal_lm", "max_length": 128, "samples": ["Tell me a story."]},
        rounds=3, stack=["sparse"],
        adapter={"targets": ["all"]}, arms={"ranks": [8], "bits": [32], "steps": [8], "batch": 8},
        training={"lr": 0.005, "evaluate": 24},
    )  # fmt: skip
    async with world:
        name = await world.run(text, 120)
        rows = world.coordinator.ledger.rows(tables.versions, job=name)
        told = database.read(world.coordinator.ledger.rows(tables.assignments, job=name)[-1]["telemetry"])
    losses = [database.read(r["metrics"])["loss"] for r in rows]
    assert losses[-1] < losses[0] - 0.2
    assert len(told["samples"][0]) > 10


async def test_regression(tmp_path: Path, tiny: Path) -> None:
    """The value is how many of the words are colours."""
    world = World(tmp_path, tiny, devices=2, task="text_regression")
    for n, path in enumerate(world.data.values()):
        found = [
            {"text": r["text"], "value": sum(w in small.WORDS[:3] for w in r["text"].split()) / 4}
            for r in small.rows(160, n)
        ]
        path.write_text("\n".join(json.dumps(r) for r in found))
    text = job(
        task={"dataset": "words", "kind": "text_regression", "max_length": 16, "tolerance": 0.25}, rounds=8,
        training={"lr": 0.03, "evaluate": 64},
        arms={"ranks": [4], "depths": [2], "bits": [32], "steps": [20], "batch": 16},
    )  # fmt: skip
    async with world:
        name = await world.run(text)
        measured = [
            database.read(r["metrics"]) for r in world.coordinator.ledger.rows(tables.versions, job=name)
        ]
    assert measured[-1]["loss"] < 0.7 * measured[0]["loss"]
    assert measured[-1]["accuracy"] > measured[0]["accuracy"] + 0.2


@pytest.mark.parametrize(
    ("task", "message"),
    [
        ({"kind": "causal_lm"}, "needs a causal language model"),
        ({"kind": "text_regression", "labels": ["a"]}, "has no labels"),
        ({"kind": "text_classification"}, "needs `labels`"),
        ({"kind": "poetry"}, "is not known"),
    ],
)
def test_jobs_that_cannot_be(tiny: Path, task: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Plan(read_job(job(task={"dataset": "words", **task})), read_card(tiny))


@pytest.mark.parametrize("value", ["tall", None, float("inf")])
def test_values_that_are_no_numbers(tiny: Path, value: Any) -> None:
    task = engine(Task("words", "text_regression"), str(tiny))
    with pytest.raises(Refused, match="value"):
        task.encode([{"text": "red", "value": value}])


def test_gzipped_lines_are_read(tmp_path: Path) -> None:
    from rankfleet.edge_agent.config import Dataset
    from rankfleet.edge_agent.worker.data import Shard

    with gzip.open(tmp_path / "d.jsonl.gz", "wt") as file:
        file.write("\n".join(json.dumps(q) for q in questions(30, 0)))
    shard = Shard(
        Dataset(str(tmp_path / "d.jsonl.gz")), "x", ["instruction", "output", "input"], [], {"input"}
    )
    assert len(shard.train) + len(shard.held) == 30 - shard.duplicates
    with pytest.raises(Refused, match="no column `answer`"):
        Shard(
            Dataset(str(tmp_path / "d.jsonl.gz"), columns={"output": "answer"}),
            "x",
            ["instruction", "output"],
            [],
        )


def test_numbers_of_a_prompt_do_not_depend_on_its_neighbours(llama: Path) -> None:
    task = lm(llama)
    base, found = Base(llama, [], 32, {}, causal=True), task.encode(questions(5, 3))
    with torch.inference_mode():
        together = task.collate(found)
        all_at_once = task.losses(task.forward(base, {}, together), together)
        alone = [task.losses(task.forward(base, {}, b), b)[0] for b in (task.collate([e]) for e in found)]
    assert np.allclose(all_at_once.numpy(), torch.stack(alone).numpy(), atol=1e-5)
