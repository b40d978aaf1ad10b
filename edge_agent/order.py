"""What the service tells the worker, and where the answer lies: the folder contract between the two processes.

A finished round is one folder, renamed into place: `update` (frame), `state` (methods' state after the round), `meta.json`.
So update and state are committed together, whatever is killed when.
"""

import shutil
from pathlib import Path
from typing import Any

import msgspec

from federated.files import sync_folder, write_atomic
from federated.messages import Blob

from .config import Dataset


class Order(msgspec.Struct, frozen=True):
    """One assignment, with everything the worker needs to find."""

    home: str
    envelope: str
    blobs: dict[str, str]
    folder: str
    """Where the finished round goes, `…/jobs/<job>/r000003`."""
    dataset: Dataset
    model: str
    threads: int
    budget_mb: float
    chunk: int
    require: tuple[Any, ...] = ()
    slots: int | None = None


class Meta(msgspec.Struct, frozen=True):
    """`meta.json` of a finished round."""

    job: str
    round: int
    blob: Blob
    signature: bytes


def round_folder(jobs: Path, job: str, round: int) -> Path:
    """Where a round's result lies."""
    return jobs / job / f"r{round:06d}"


def last_state(folder: Path) -> Path | None:
    """State of the newest finished round before the one that `folder` is for."""
    if not folder.parent.exists():
        return None
    older = sorted(p for p in folder.parent.glob("r??????") if p.name < folder.name and (p / "state").exists())
    return older[-1] / "state" if older else None


def commit(folder: Path, update: bytes, state: bytes, meta: Meta) -> None:
    """Put a finished round in its place, all or nothing."""
    part = folder.with_name(f".{folder.name}.new")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    write_atomic(part / "update", update)
    write_atomic(part / "state", state)
    write_atomic(part / "meta.json", msgspec.json.encode(meta))
    shutil.rmtree(folder, ignore_errors=True)
    part.rename(folder)
    sync_folder(folder.parent)


def read_meta(folder: Path) -> Meta:
    """Raises OSError or msgspec.MsgspecError where a result is damaged."""
    return msgspec.json.decode((folder / "meta.json").read_bytes(), type=Meta)
