"""A version as files that other tools read: peft's format, the base with the adapter in it, ONNX, GGUF for llama.cpp.

Reads the data directory; needs no service, and neither torch nor transformers.
"""

from pathlib import Path

import msgspec
import numpy as np

from rankfleet.federated.contract.update import LowRank
from rankfleet.federated.errors import ConfigError
from rankfleet.federated.peft_format import LOAD_MERGED, head_files, write_adapter
from rankfleet.federated.program.files import write_atomic
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
            raise ConfigError(f"version {number} of `{job}` is not on disk any more", f"coordinator versions list {job}") from None
    finally:
        ledger.close()


def shown(config: CoordinatorConfig, version: Version, spec: JobSpec) -> Version:
    """A version with the factors that methods make of other tensors, and with its carry. Raises ConfigError for what no pair can say."""
    from rankfleet.federated.contract.catalogue import build_stack
    from rankfleet.federated.contract.spec import Pair, Spec
    from rankfleet.federated.contract.stack import Stack

    stack = Stack(build_stack(list(spec.stack)), spec.space)
    if stack.using("attach"):
        raise ConfigError(f"`{stack.using('attach')[0][0]}` cannot be exported: it is no low-rank change of the weights")
    if stack.using("express"):
        shapes = {m: Pair(0, len(p.B), p.A.shape[1], 0, spec.adapter.scale, len(p.B), p.A.shape[1], "") for m, p in version.pairs.items()}
        full = stack.express({**version.dense}, Spec(shapes, {}), np)
        version.pairs = {m: LowRank(full[f"{m}.B"], full[f"{m}.A"]) for m in shapes if f"{m}.B" in full}
    for m, c in version.carry.items():
        p = version.pairs[m]
        version.pairs[m] = LowRank(np.concatenate([p.B, c.B / spec.adapter.scale], axis=1), np.concatenate([p.A, c.A], axis=0))
    return version


def base_folder(config: CoordinatorConfig, spec: JobSpec) -> Path:
    """The base model of a job. Raises ConfigError."""
    if spec.model not in config.models:
        raise ConfigError(f"the coordinator has no base model `{spec.model}` any more", f"add `models: {{{spec.model}: FOLDER}}`")
    return Path(config.models[spec.model])


def write(config: CoordinatorConfig, job: str, to: Path, number: int | None = None, kind: str = "peft", ratio: float = 0.0) -> int:
    """Write version `number` (default: the newest good one) into `to`; returns which it was. Raises ConfigError.

    `ratio` cuts heads and feed-forward channels as devices at that pruning ratio do; only a whole model can be cut.
    """
    version, spec = load(config, job, number)
    version = shown(config, version, spec)
    if ratio and kind in ADAPTERS:
        raise ConfigError(
            f"a pruned model is written whole, not as {kind}", f"--format {', '.join(f for f in FORMATS if f not in ADAPTERS)}"
        )
    task = {**msgspec.to_builtins(spec.task), "version": version.number}
    scale = spec.adapter.scale
    if kind == "peft":
        flipped = spec.model in config.models and is_transposed(read_card(base_folder(config, spec)))
        write_adapter(to, version.pairs, version.dense, scale=scale, base=spec.model, task=task, transposed=flipped)
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

        write_model(Weights(version, base_folder(config, spec), ratio, scale), to, f"{job} version {version.number}")
    return version.number


def write_beside(to: Path, files: dict[str, bytes]) -> None:
    """Small files beside a model."""
    for name, data in files.items():
        write_atomic(to / name, data)
