"""What operators signed is read by the one loader on both sides, so that a job says the same to both."""

from types import SimpleNamespace
from typing import Any

import msgspec
import pytest

from rankfleet.coordinator.jobs.spec import JobSpec, TaskSpec, Training, read_job
from rankfleet.edge_agent.trust.warrant import _same
from rankfleet.federated.errors import Refused
from rankfleet.federated.trust.signed_job import SignedJob, SignedTask, SignedTraining
from rankfleet.federated.wire.messages import Task

MINIMAL = "name: toy\nmodel: tiny\ntask: {dataset: words, labels: [yes, no]}\n"


def assignment(text: str, **changes: Any) -> Any:
    """As the planner fills it from the coordinator's reading of the job."""
    spec = read_job(text)
    t = spec.task
    task = Task(t.dataset, t.kind, list(t.labels), t.max_length, t.template, t.tolerance, list(t.samples))
    recipe = SimpleNamespace(optimizer=spec.training.optimizer or "adamw")
    fields = {
        "job": f"{spec.name}-3",
        "model": spec.model,
        "rounds": spec.rounds,
        "stack": list(spec.stack),
        "task": task,
    }
    return SimpleNamespace(**{**fields, "recipe": recipe, "purpose": "train", **changes})


@pytest.mark.parametrize(
    "text",
    [
        MINIMAL,
        MINIMAL.replace("[yes, no]", "[on, off, y, n, 'true']"),
        MINIMAL.replace("[yes, no]", "['012', '1e3', 12:30:00, 2026-01-01, 0b1]"),
        MINIMAL
        + "rounds: 0x10\nstack: [{sparse: {keep: 1e-1}}]\n"
        + "training: {optimizer: sgd, lr: 1e-3}\narms: {ranks: [4]}\n",
    ],
)
def test_both_sides_read_the_same(text: str) -> None:
    _same(text, assignment(text))


def test_labels_are_words() -> None:
    assert read_job(MINIMAL).task.labels == ("yes", "no")


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"rounds": 11}, "rounds"),
        ({"job": "other-3"}, "name"),
        ({"stack": []}, "stack"),
        ({"model": "big"}, "model"),
        ({"task": Task("words", "text_classification", ["yes", "no"], tolerance=0.1)}, "task.tolerance"),
        ({"task": Task("secrets", "text_classification", ["yes", "no"])}, "task.dataset"),
        ({"task": Task("words", "text_classification", ["no", "yes"])}, "task.labels"),
        ({"recipe": SimpleNamespace(optimizer="sgd")}, "optimizer"),
    ],
)
def test_what_differs_is_named(changes: dict[str, Any], what: str) -> None:
    with pytest.raises(Refused, match=f"the assignment's {what} is"):
        _same(MINIMAL, assignment(MINIMAL, **changes))


def test_a_device_passes_over_what_a_newer_coordinator_has() -> None:
    _same(MINIMAL + "colour: {shade: [blue]}\n", assignment(MINIMAL))
    _same(MINIMAL.replace("labels", "wishes: 3, labels"), assignment(MINIMAL))


@pytest.mark.parametrize("text", ["[1, 2]", "name: toy", "a: &x 1\nb: *x", "name: [1"])
def test_what_is_no_job_is_refused(text: str) -> None:
    with pytest.raises(Refused):
        _same(text, assignment(MINIMAL))


@pytest.mark.parametrize(
    ("signed", "whole"), [(SignedJob, JobSpec), (SignedTask, TaskSpec), (SignedTraining, Training)]
)
def test_no_default_stands_twice(signed: type[msgspec.Struct], whole: type[msgspec.Struct]) -> None:
    assert issubclass(whole, signed)
    own = set(vars(whole).get("__annotations__", {})) & {f.name for f in msgspec.structs.fields(signed)}
    assert own <= {"task", "training"}  # narrowed to the stricter struct
