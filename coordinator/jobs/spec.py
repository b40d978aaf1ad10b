"""A job: one YAML file, validated whole before anything starts."""

from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from rankfleet.bandit.arms import ArmSpace
from rankfleet.federated.program.loader import loads
from rankfleet.federated.transport.topics import checked
from rankfleet.federated.trust.signed_job import SignedJob, SignedTask, SignedTraining

Rate = Annotated[float, Meta(gt=0, le=1)]


class TaskSpec(SignedTask, frozen=True, forbid_unknown_fields=True):
    """What is learnt."""


class AdapterSpec(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Which modules may be adapted, and how strongly."""

    targets: tuple[str, ...] = ("auto",)
    """`auto` (q and v on encoders, every linear map on decoders), `all`, or endings of module names."""
    scale: Annotated[float, Meta(gt=0)] = 2.0
    """s = alpha/r, the same for every rank."""
    max_depth: Annotated[int, Meta(ge=1)] | None = None
    """Deepest placement of the fleet; None: half of the layers, so that a common frozen prefix exists."""


class Training(SignedTraining, frozen=True, forbid_unknown_fields=True):
    """The local loop."""

    lr: Annotated[float, Meta(gt=0, le=1)] = 1e-3
    clip: Annotated[float, Meta(ge=0)] = 1.0
    """Norm that a step's gradient is cut to; 0, and with such a method: not cut."""
    warmup: Annotated[float, Meta(ge=0, le=1)] = 0.1
    """Share of a round's steps in which the learning rate rises; none with such a method."""
    probe: Annotated[int, Meta(ge=1)] = 32
    evaluate: Annotated[int, Meta(ge=0)] = 128


class PolicySpec(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How arms are chosen."""

    name: str = "cost_ucb"
    settings: dict[str, Any] = {}


class JobSpec(SignedJob, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`job.yaml`."""

    task: TaskSpec
    training: Training = Training()
    space: Literal["", "factors", "product"] = ""
    adapter: AdapterSpec = AdapterSpec()
    arms: ArmSpace = ArmSpace()
    policy: PolicySpec = PolicySpec()
    devices: tuple[str, ...] = ("*",)
    where: dict[str, str] = {}
    """Tags that a device must have, with patterns: `{site: lab, gpu: "*"}`."""
    canary: Annotated[float, Meta(ge=0, lt=1)] = 0.0
    """Share of the devices that get the final version first; the others follow if it is not worse there
    than the last good one."""
    most_weight: Annotated[float, Meta(ge=0)] = 10.0
    """Examples that a device claims count as at most so many medians of the round's claims, and as twice
    its own last one; 0: no bound."""
    norm_factor: Annotated[float, Meta(ge=0)] = 6.0
    """An update whose norm for its steps is more than so many medians of the last rounds is put aside; 0:
    never."""
    quorum: Rate = 0.8
    """Share of the invited devices that must have answered when the deadline has passed."""
    deadline_s: Annotated[float, Meta(ge=0)] | Literal["auto"] = "auto"
    """`auto` is twice the predicted time of the slowest device; 0 waits for everybody."""
    late: Literal["fold", "drop"] = "fold"
    min_devices: Annotated[int, Meta(ge=1)] = 1
    frozen_every: Annotated[int, Meta(ge=1)] = 5
    """Rounds between refreshes of the adapted layers below a device's boundary (docs/specification.md)."""
    seed: int = 0
    staleness: Annotated[int, Meta(ge=0, le=100)] = 3
    """Versions that a late update may be behind; so many views and versions are kept."""
    start: str = ""
    """A job whose newest adapter this one goes on from."""
    frozen: bool = False
    """Leave that adapter as it is: all devices apply it, and a new one is trained beside it."""


def read_job(text: str, name: str = "job.yaml") -> JobSpec:
    """The job in a YAML text, syntax and types checked; `Plan` checks the rest. Raises ConfigError."""
    spec = loads(text, JobSpec, name)
    checked(spec.name, "job")
    return spec


def read_job_file(path: Path) -> JobSpec:
    """A job file. Raises ConfigError."""
    from rankfleet.federated.program.loader import read

    return read_job(read(path), str(path))
