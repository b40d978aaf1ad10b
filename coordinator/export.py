"""A version as files that other tools read: peft's format, the base with the adapter in it, a GGUF LoRA for llama.cpp.

Reads the data directory; needs no service, and neither torch nor transformers.
"""

import json
import shutil
from pathlib import Path

import msgspec
import numpy as np

from federated.errors import ConfigError
from federated.files import write_atomic
from federated.peft_format import LOAD_MERGED, head_files, used_pairs, write_adapter
from federated.tensors import Array
from federated.update import LowRank
from profiles.card import Entry, entries

from . import store
from .config import CoordinatorConfig
from .job import JobSpec, read_job
from .registry import Registry, Version

FORMATS = ("peft", "merged", "gguf")


def current(ledger: store.Store, job: str) -> int:
    """The newest good version of a job, else the newest one. Raises ConfigError where there is none."""
    rows = ledger.rows(store.versions, job=job)
    if not rows:
        raise ConfigError(f"job `{job}` has no version yet", "coordinator jobs")
    good = [r["number"] for r in rows if r["state"] == "good"]
    return int(max(good or [r["number"] for r in rows if r["state"] != "rolled back"]))


def load(config: CoordinatorConfig, job: str, number: int | None = None) -> tuple[Version, JobSpec]:
    """A version and its job. Raises ConfigError."""
    ledger = store.Store(config.database or f"sqlite:///{config.home / 'ledger.db'}")
    try:
        row = ledger.row(store.jobs, id=job)
        if row is None:
            raise ConfigError(f"no job `{job}` in {config.home}", "coordinator jobs")
        number = current(ledger, job) if number is None else number
        try:
            return Registry(config.home / "jobs" / job).load(number), read_job(row["text"])
        except FileNotFoundError:
            raise ConfigError(f"version {number} of `{job}` is not on disk any more", f"coordinator versions list {job}") from None
    finally:
        ledger.close()


def base_folder(config: CoordinatorConfig, spec: JobSpec) -> Path:
    """The base model of a job. Raises ConfigError."""
    if spec.model not in config.models:
        raise ConfigError(f"the coordinator has no base model `{spec.model}` any more", f"add `models: {{{spec.model}: FOLDER}}`")
    return Path(config.models[spec.model])


def write(config: CoordinatorConfig, job: str, to: Path, number: int | None = None, kind: str = "peft", ratio: float = 0.0) -> int:
    """Write version `number` (default: the newest good one) into `to`; returns which it was. Raises ConfigError.

    `ratio` cuts heads and feed-forward channels as devices at that pruning ratio do; only a merged model can be cut.
    """
    version, spec = load(config, job, number)
    if ratio:
        if kind != "merged":
            raise ConfigError(f"a pruned model is written whole, not as {kind}", "--format merged")
        from .pruned import write_pruned

        write_pruned(version, base_folder(config, spec), to, ratio, spec.adapter.scale)
        _write_head(version, spec, to)
    elif kind == "merged":
        merged(version, spec, base_folder(config, spec), to)
    elif kind == "gguf":
        from .gguf_lora import write_gguf

        write_gguf(to, version.pairs, spec.adapter.scale, base_folder(config, spec), f"{job} version {version.number}")
    else:
        task = {**msgspec.to_builtins(spec.task), "version": version.number}
        write_adapter(
            to,
            version.pairs,
            version.dense,
            scale=spec.adapter.scale,
            base=spec.model,
            task=task,
            transposed=is_transposed(Path(config.models.get(spec.model, ""))),
        )
    return version.number


def is_transposed(base: Path) -> bool:
    """Does this base keep its linear maps as (in, out)? GPT-2 does."""
    file = base / "config.json"
    return file.exists() and json.loads(file.read_text(encoding="utf-8")).get("model_type") == "gpt2"


def merged(version: Version, spec: JobSpec, base: Path, to: Path) -> None:
    """A whole model folder: W + s·B·A in every adapted map, in the dtype of the checkpoint, the head beside it."""
    to.mkdir(parents=True, exist_ok=True)
    pairs, transposed = used_pairs(version.pairs), is_transposed(base)
    for file in sorted(p for p in base.iterdir() if p.is_file() and p.suffix in (".safetensors", ".json", ".txt", ".model", ".jinja")):
        shutil.copyfile(file, to / file.name)
        if file.suffix == ".safetensors":
            for name, entry in entries(file).items():
                if (pair := pairs.get(name.removesuffix(".weight"))) is not None and name.endswith(".weight"):
                    _add(to / file.name, entry, pair, spec.adapter.scale, transposed)
    _write_head(version, spec, to)


def _write_head(version: Version, spec: JobSpec, to: Path) -> None:
    """The head beside a whole model."""
    if version.dense:
        for name, data in head_files(version.dense, {**msgspec.to_builtins(spec.task), "version": version.number}, LOAD_MERGED).items():
            write_atomic(to / name, data)


def _add(file: Path, entry: Entry, pair: LowRank, scale: float, transposed: bool) -> None:
    """W + s·B·A, in place."""
    kinds = {"F32": "<f4", "F16": "<f2", "BF16": "<u2", "F64": "<f8"}
    if entry.dtype not in kinds:
        raise ConfigError(f"{file.name} holds weights as {entry.dtype}, which cannot be added to", "export as peft instead")
    stored = np.memmap(file, dtype=kinds[entry.dtype], mode="r+", offset=entry.offset, shape=tuple(entry.shape))
    change = scale * (pair.B.astype(np.float64) @ pair.A.astype(np.float64))
    change = change.T if transposed else change
    if entry.dtype == "BF16":
        stored[:] = to_bf16((stored.astype(np.uint32) << 16).view(np.float32) + change.astype(np.float32))
    else:
        stored[:] = (stored.astype(np.float64) + change).astype(stored.dtype)
    stored.flush()


def to_bf16(values: Array) -> Array:
    """fp32 rounded to the nearest bf16 (ties to even), as u16 bits."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
