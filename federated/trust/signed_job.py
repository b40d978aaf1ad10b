"""What operators sign of a job, decoded by both sides with the one loader: every default stands here and
nowhere else.

A device passes over keys that it does not know (a newer coordinator may have more); the coordinator's
`JobSpec` extends these structs and forbids them.
"""

from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from ..contract.catalogue import StackItem


class SignedTask(msgspec.Struct, frozen=True):
    """What is learnt. Devices map `dataset` to a file of their own."""

    dataset: str
    kind: str = "text_classification"
    labels: tuple[str, ...] = ()
    max_length: Annotated[int, Meta(ge=4, le=8192)] = 128
    template: str = ""
    """`{text}` on classifiers; `{instruction}` and `{input}`, or `chat`, on causal language models."""
    tolerance: Annotated[float, Meta(gt=0)] = 0.5
    """Regression: how far off still counts as right."""
    samples: Annotated[tuple[str, ...], Meta(max_length=8)] = ()
    """Causal language models: prompts that are answered with the first and the last version, for the
    report."""


class SignedTraining(msgspec.Struct, frozen=True):
    """What of the local loop operators sign."""

    optimizer: Literal["", "adamw", "sgd"] = ""
    """Empty: `adamw`, or `sgd` where a method of the stack needs the gradient to be the step."""


class SignedJob(msgspec.Struct, frozen=True):
    """The part of `job.yaml` that a device holds an assignment against."""

    name: str
    model: str
    task: SignedTask
    rounds: Annotated[int, Meta(ge=1, le=100_000)] = 10
    stack: tuple[StackItem, ...] = ("sparse",)
    training: SignedTraining = SignedTraining()
