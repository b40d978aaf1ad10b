"""A version as files that other tools read: peft's format with the head beside it. Reads the data directory; needs no service."""

from pathlib import Path

import msgspec

from federated.errors import ConfigError
from federated.peft_format import write_adapter

from . import store
from .config import CoordinatorConfig
from .job import JobSpec, read_job
from .registry import Registry, Version


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


def to_peft(config: CoordinatorConfig, job: str, folder: Path, number: int | None = None) -> int:
    """Write peft's format into `folder`; returns the version."""
    version, spec = load(config, job, number)
    task = {**msgspec.to_builtins(spec.task), "version": version.number}
    write_adapter(folder, version.pairs, version.dense, scale=spec.adapter.scale, base=spec.model, task=task)
    return version.number
