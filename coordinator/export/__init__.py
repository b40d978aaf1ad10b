"""A version as files that other tools read: peft's format, the base with the adapter in it, ONNX, GGUF for
llama.cpp.

Reads the data directory; needs no service, and neither torch nor transformers.
"""

from pathlib import Path

import msgspec
import numpy as np

from rankfleet.federated.contract.catalogue import build_stack
from rankfleet.federated.contract.spec import Dense, Pair, Spec
from rankfleet.federated.contract.stack import Stack
from rankfleet.federated.contract.update import LowRank
from rankfleet.federated.errors import ConfigError
from rankfleet.federated.peft_format import LOAD_MERGED, head_files, write_adapter
from rankfleet.federated.program.files import write_atomic
from rankfleet.federated.tasks import head_shapes
from rankfleet.profiles.card import read_card

from ..config import CoordinatorConfig
from ..jobs.spec import JobSpec, read_job
from ..store.database import url_of
from ..store.ledger import Ledger
from ..store.versions import Registry, Version
from .folder import write_folder
from .weights import Weights, is_transposed

ADAPTERS, WHOLE = ("peft", "gguf"), ("merged", "onnx", "gguf-merged")
FORMATS = ADAPTERS + WHOLE


def current(ledger: Ledger, job: str) -> int:
    """The newest good version of a job, else the newest one. Raises ConfigError where there is none."""
    rows = ledger.versions(job)
    if not rows:
        raise ConfigError(f"job `{job}` has no version yet", "coordinator jobs")
    good = [r["number"] for r in rows if r["state"] == "good"]
    return int(max(good or [r["number"] for r in rows if r["state"] != "rolled back"]))


def load(config: CoordinatorConfig, job: str, number: int | None = None) -> tuple[Version, JobSpec]:
    """A version and its job. Raises ConfigError."""
    ledger = Ledger(url_of(config))
    try:
        row = ledger.job(job)
        if row is None:
            raise ConfigError(f"no job `{job}` in {config.home}", "coordinator jobs")
        number = current(ledger, job) if number is None else number
        try:
            return Registry(config.home / "jobs" / job).load(number), read_job(row["text"])
        except FileNotFoundError:
            raise ConfigError(
                f"version {number} of `{job}` is not on disk any more", f"coordinator versions list {job}"
            ) from None
    finally:
        ledger.close()


def shown(version: Version, spec: JobSpec) -> Version:
    """A version whose pairs are what the model computes with: made by the stack's `express`, with the
    carry as further rank.

    Raises ConfigError for what no pair can say.
    """
    stack = Stack(build_stack(list(spec.stack)), spec.space)
    if attached := stack.using("attach"):
        raise ConfigError(
            f"`{attached[0][0]}` cannot be exported: it is no low-rank change of the weights",
            "devices answer with it: `edge-agent infer`",
        )
    scale, pairs = spec.adapter.scale, dict(version.pairs)
    if stack.using("express"):
        maps = {
            m: Pair(0, len(p.B), p.A.shape[1], len(p.A), scale, len(p.B), p.A.shape[1], "")
            for m, p in pairs.items()
        }
        dense = {k: Dense(tuple(t.shape)) for k, t in version.dense.items()}
        own = {f"{m}.{side}": t for m, p in pairs.items() for side, t in (("A", p.A), ("B", p.B))}
        full = stack.express({**own, **version.dense}, Spec(maps, dense), np)
        pairs = {m: LowRank(full[f"{m}.B"], full[f"{m}.A"]) for m in pairs}
    for m, c in version.carry.items():
        p = pairs[m]
        pairs[m] = LowRank(np.concatenate([p.B, c.B / scale], axis=1), np.concatenate([p.A, c.A], axis=0))
    heads = head_shapes(spec.task.kind, len(spec.task.labels), 0)
    return Version(version.number, pairs, {k: t for k, t in version.dense.items() if k in heads}, {}, {})


def base_folder(config: CoordinatorConfig, spec: JobSpec) -> Path:
    """The base model of a job. Raises ConfigError."""
    if spec.model not in config.models:
        raise ConfigError(
            f"the coordinator has no base model `{spec.model}` any more",
            f"add `models: {{{spec.model}: FOLDER}}`",
        )
    return Path(config.models[spec.model])


def write(
    config: CoordinatorConfig,
    job: str,
    to: Path,
    number: int | None = None,
    kind: str = "peft",
    ratio: float = 0.0,
) -> int:
    """Write version `number` (default: the newest good one) into `to`; returns which it was. Raises
    ConfigError.

    `ratio` cuts heads and feed-forward channels as devices at that pruning ratio do; only a whole model
    can be cut.
    """
    version, spec = load(config, job, number)
    version = shown(version, spec)
    if ratio and kind in ADAPTERS:
        raise ConfigError(
            f"a pruned model is written whole, not as {kind}",
            f"--format {', '.join(f for f in FORMATS if f not in ADAPTERS)}",
        )
    task = {**msgspec.to_builtins(spec.task), "version": version.number}
    scale = spec.adapter.scale
    if kind == "peft":
        flipped = spec.model in config.models and is_transposed(read_card(base_folder(config, spec)))
        write_adapter(
            to, version.pairs, version.dense, scale=scale, base=spec.model, task=task, transposed=flipped
        )
    elif kind == "merged":
        write_folder(version, base_folder(config, spec), to, ratio, scale)
        write_beside(to, head_files(version.dense, task, LOAD_MERGED if version.dense else ""))
    elif kind == "onnx":
        from .onnx_encoder import write_onnx

        write_onnx(Weights(version, base_folder(config, spec), ratio, scale), to, version.dense, task)
    elif kind == "gguf":
        from .gguf_lora import write_gguf

        write_gguf(to, version.pairs, scale, base_folder(config, spec), f"{job} version {version.number}")
    else:
        from .gguf_model import write_model

        write_model(
            Weights(version, base_folder(config, spec), ratio, scale), to, f"{job} version {version.number}"
        )
    return version.number


def write_beside(to: Path, files: dict[str, bytes]) -> None:
    """Small files beside a model."""
    for name, data in files.items():
        write_atomic(to / name, data)
