"""A job: one YAML file, validated whole before anything starts."""

from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from rankfleet.bandit.arms import ArmSpace, expand, targets
from rankfleet.bandit.policy import Policy
from rankfleet.bandit.tuner import POLICIES
from rankfleet.federated.contract.catalogue import StackItem, build_stack
from rankfleet.federated.contract.stack import Stack
from rankfleet.federated.errors import ConfigError
from rankfleet.federated.heads import head_shapes
from rankfleet.federated.program.loader import loads
from rankfleet.federated.transport.topics import checked
from rankfleet.federated.wire.messages import Task
from rankfleet.profiles.card import ModelCard, Module

Rate = Annotated[float, Meta(gt=0, le=1)]


class TaskSpec(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
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
    """Causal language models: prompts that are answered with the first and the last version, for the report."""


class AdapterSpec(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Which modules may be adapted, and how strongly."""

    targets: tuple[str, ...] = ("auto",)
    """`auto` (q and v on encoders, every linear map on decoders), `all`, or endings of module names."""
    scale: Annotated[float, Meta(gt=0)] = 2.0
    """s = alpha/r, the same for every rank."""
    max_depth: Annotated[int, Meta(ge=1)] | None = None
    """Deepest placement of the fleet; None: half of the layers, so that a common frozen prefix exists."""


class Training(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The local loop."""

    lr: Annotated[float, Meta(gt=0, le=1)] = 1e-3
    optimizer: Literal["adamw", "sgd"] = "adamw"
    probe: Annotated[int, Meta(ge=1)] = 32
    evaluate: Annotated[int, Meta(ge=0)] = 128


class PolicySpec(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How arms are chosen."""

    name: str = "cost_ucb"
    settings: dict[str, Any] = {}


class JobSpec(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`job.yaml`."""

    name: str
    model: str
    task: TaskSpec
    rounds: Annotated[int, Meta(ge=1, le=100_000)] = 10
    stack: tuple[StackItem, ...] = ("sparse",)
    space: Literal["", "factors", "product"] = ""
    adapter: AdapterSpec = AdapterSpec()
    arms: ArmSpace = ArmSpace()
    policy: PolicySpec = PolicySpec()
    training: Training = Training()
    devices: tuple[str, ...] = ("*",)
    where: dict[str, str] = {}
    """Tags that a device must have, with patterns: `{site: lab, gpu: "*"}`."""
    canary: Annotated[float, Meta(ge=0, lt=1)] = 0.0
    """Share of the devices that get the final version first; the others follow if it is not worse there than the last good one."""
    most_weight: Annotated[float, Meta(ge=0)] = 10.0
    """Examples that a device claims count as at most so many medians of the round's claims, and as twice its own last one; 0: no bound."""
    norm_factor: Annotated[float, Meta(ge=0)] = 6.0
    """An update whose norm for its steps is more than so many medians of the last rounds is put aside; 0: never."""
    quorum: Rate = 0.8
    """Share of the invited devices that must have answered when the deadline has passed."""
    deadline_s: Annotated[float, Meta(ge=0)] | Literal["auto"] = "auto"
    """`auto` is twice the predicted time of the slowest device; 0 waits for everybody."""
    late: Literal["fold", "drop"] = "fold"
    min_devices: Annotated[int, Meta(ge=1)] = 1
    frozen_every: Annotated[int, Meta(ge=1)] = 5
    """Rounds between refreshes of the adapted layers below a device's boundary (docs/specification.md)."""
    seed: int = 0


class Plan:
    """A validated job with everything that follows from it."""

    def __init__(self, spec: JobSpec, card: ModelCard) -> None:
        self.spec, self.card = spec, card
        self.stack = Stack(build_stack(list(spec.stack)), spec.space)
        self.modules: list[Module] = targets(card, list(spec.adapter.targets))
        if not self.modules:
            raise ConfigError(
                f"no module of `{card.name}` ends with {', '.join(spec.adapter.targets)}",
                f"its modules are {', '.join(sorted({m.name.rpartition('.')[2] for m in card.modules}))}",
            )
        self.max_depth = min(card.layers, spec.adapter.max_depth or max(1, card.layers // 2))
        self.heads = head_shapes(spec.task.kind, len(spec.task.labels), card.hidden)
        self.head_size = sum(_product(s) for s in self.heads.values())
        self.policy = _policy(spec.policy)
        self.keep = float(getattr(self.stack.methods.get("sparse"), "keep", 1.0))
        self._check_arms()
        placed = {name for rule in spec.arms.rules(self.max_depth) for name in expand(rule, card, self.modules)}
        self.floor = min((m.layer for m in self.modules if m.name in placed), default=0)
        """The lowest layer that any arm adapts: what lies below never changes in this job."""

    def _check_arms(self) -> None:
        arms = self.spec.arms
        for rule in arms.placements:
            try:
                expand(rule, self.card, self.modules)
            except ValueError as error:
                raise ConfigError(f"arms.placements: {error}") from None
        if bad := [b for b in arms.precisions if b not in (32, 16, 8, 4)]:
            raise ConfigError(f"arms.bits: {bad[0]} is not one of 32, 16, 8, 4")
        if not arms.rules(self.max_depth):
            raise ConfigError(f"arms.depths {list(arms.depths)}: none is within max_depth {self.max_depth}")
        if self.spec.task.kind == "causal_lm" and not self.card.causal:
            raise ConfigError(f"task `causal_lm` needs a causal language model, `{self.card.name}` is a {self.card.family} encoder")
        if len(set(self.spec.task.labels)) != len(self.spec.task.labels):
            raise ConfigError("task.labels holds a label twice")
        if self.stack.space == "factors" and (max(arms.prune) > 0):
            raise ConfigError(
                "the stack needs factors that keep their coordinates, and `arms.prune` would cut them",
                "set `arms: {prune: [0]}` or use product space",
            )

    def task(self) -> Task:
        """What devices are told of the task."""
        t = self.spec.task
        return Task(t.dataset, t.kind, list(t.labels), t.max_length, t.template, t.tolerance, list(t.samples))


def _product(shape: tuple[int, ...]) -> int:
    n = 1
    for s in shape:
        n *= s
    return n


def _policy(spec: PolicySpec) -> Policy:
    if spec.name not in POLICIES:
        raise ConfigError(f"policy `{spec.name}` is not known", f"one of {', '.join(POLICIES)}")
    try:
        return msgspec.convert(spec.settings, POLICIES[spec.name])
    except msgspec.ValidationError as error:
        raise ConfigError(f"policy `{spec.name}`: {error}") from None


def read_job(text: str, name: str = "job.yaml") -> JobSpec:
    """The job in a YAML text, syntax and types checked; `Plan` checks the rest. Raises ConfigError."""
    spec = loads(text, JobSpec, name)
    checked(spec.name, "job")
    return spec


def read_job_file(path: Path) -> JobSpec:
    """A job file. Raises ConfigError."""
    from rankfleet.federated.program.loader import read

    return read_job(read(path), str(path))
