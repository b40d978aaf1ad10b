"""What the service tells the worker, and where the answer lies: the contract between the two processes.

A finished round is two files beside each other: `r000003.update` (what will be sent, with its address and
signature) and `r000003.state` (methods' state after the round), written in this order, each durably. So a
round is finished when its state is there, and an update without a state is as if it had not been made. The
update goes with its receipt.
"""

import struct
from pathlib import Path
from typing import Any

import msgspec

from rankfleet.federated.program.files import digest_of, write_in_order
from rankfleet.federated.wire.messages import Blob

from .config import Dataset


class Order(msgspec.Struct, frozen=True):
    """One assignment, with everything the worker needs to find."""

    home: str
    envelope: bytes
    """The assignment as it arrived, sealed and signed."""
    blobs: dict[str, str]
    result: str
    """Where the finished round goes, `…/jobs/<job>/r000003`, without the endings."""
    dataset: Dataset
    model: str
    threads: int
    budget_mb: float
    chunk: int
    require: tuple[Any, ...] = ()
    slots: int | None = None
    inline: bool = False
    cache_mb: float = 0.0
    """Disk that the activation cache may take."""
    shelf_mb: float = 0.0
    """Disk that prepared bases may take; 0: none are kept."""
    writes_mb: float = 1e9
    """What may still be written today, by both together."""
    accelerator: str = "auto"
    """Where to compute: `auto`, `cpu` or `cuda`."""
    kernel_ms: dict[str, float] = {}
    """What the products took here (`rankfleet.profiles.kernels`): whether few-bit maps are computed with
    in bf16."""


MAX_META = 1 << 16


class Meta(msgspec.Struct, frozen=True):
    """Address and signature of an update, at the head of its file."""

    job: str
    round: int
    blob: Blob
    signature: bytes
    cost: dict[str, float] = {}
    """What the round took: seconds by part, `peak_mb`."""
    inline: bool = False
    """May a small update travel with its offer, without a grant?"""


def result_of(jobs: Path, job: str, round: int) -> Path:
    """Where a round's result lies, without the endings."""
    return jobs / job / f"r{round:06d}"


def update_file(result: Path) -> Path:
    """The update of a finished round, until its receipt."""
    return result.with_name(result.name + ".update")


def state_file(result: Path) -> Path:
    """Methods' state after a finished round."""
    return result.with_name(result.name + ".state")


def checkpoint_file(result: Path) -> Path:
    """A round that was cut off in the middle."""
    return result.with_name(result.name + ".part")


def last_state(result: Path) -> Path | None:
    """State of the newest finished round before the one that `result` is for."""
    return max((p for p in result.parent.glob("r??????.state") if p.name < result.name), default=None)


def commit(result: Path, update: bytes, state: bytes, meta: Meta) -> None:
    """Put a finished round in its place, all or nothing."""
    head = msgspec.msgpack.encode(meta)
    write_in_order(
        {update_file(result): struct.pack("<I", len(head)) + head + update, state_file(result): state}
    )


def read_meta(file: Path) -> Meta:
    """What is known of an update. Raises OSError or msgspec.MsgspecError where its head is damaged."""
    with file.open("rb") as opened:
        size = struct.unpack("<I", opened.read(4).ljust(4, b"\0"))[0]
        return msgspec.msgpack.decode(opened.read(min(size, MAX_META)), type=Meta)


def read_update(file: Path) -> tuple[Meta, bytes]:
    """An update and what is known of it. Raises OSError or msgspec.MsgspecError where it is damaged."""
    data = file.read_bytes()
    size = struct.unpack_from("<I", data)[0] if len(data) > 4 else 0
    meta = msgspec.msgpack.decode(data[4 : 4 + size], type=Meta)
    if digest_of(update := data[4 + size :]) != meta.blob.digest:
        raise OSError(f"{file} is damaged")
    return meta, update
