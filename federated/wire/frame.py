"""Arrays as bytes: one frame with limits, a checksum and no pickle.

    RFT1 | crc32 of the rest (u32) | header length (u32) | header | raw little-endian arrays, in header order

The header is msgpack: `[[name, dtype, shape], …]` and a `meta` value of plain msgpack types.
"""

import struct
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from ..contract.tensors import Array, Tensors
from ..errors import NotFinite, TooLarge, WireError
from ..program.files import write_atomic

MAGIC = b"RFT1"
DTYPES = {
    "f64": "<f8",
    "f32": "<f4",
    "f16": "<f2",
    "i8": "|i1",
    "i16": "<i2",
    "u8": "|u1",
    "i32": "<i4",
    "i64": "<i8",
    "u32": "<u4",
}
_NAMES = {np.dtype(v): k for k, v in DTYPES.items()}
MAX_BYTES = 4 << 30
MAX_TENSORS = 100_000
MAX_HEADER = 64 << 20


class _Header(msgspec.Struct, array_like=True, forbid_unknown_fields=True):
    tensors: list[tuple[str, str, tuple[int, ...]]]
    meta: Any = None


def encode(tensors: Mapping[str, Array], meta: Any = None) -> bytes:
    """One frame. Raises WireError for a dtype that does not travel."""
    rows: list[tuple[str, str, tuple[int, ...]]] = []
    blobs: list[bytes | memoryview] = []
    for name, array in tensors.items():
        kind = _NAMES.get(array.dtype.newbyteorder("<"))
        if kind is None:
            raise WireError(
                f"`{name}` has dtype {array.dtype}, which does not travel", f"use one of {sorted(DTYPES)}"
            )
        rows.append((name, kind, array.shape))
        blobs.append(np.ascontiguousarray(array, dtype=DTYPES[kind]).reshape(-1).view(np.uint8).data)
    header = msgspec.msgpack.encode(_Header(rows, meta))
    body = [struct.pack("<I", len(header)), header, *blobs]
    crc = 0
    for part in body:
        crc = zlib.crc32(part, crc)
    return b"".join([MAGIC, struct.pack("<I", crc), *body])


def decode(data: bytes | memoryview, *, limit: int = MAX_BYTES, finite: bool = False) -> tuple[Tensors, Any]:
    """The tensors (views into `data`, read-only) and the meta value of a frame.

    Raises TooLarge over `limit` bytes, NotFinite with `finite` where a float is NaN or infinite, else
    WireError.
    """
    if len(data) > limit:
        raise TooLarge(f"frame of {len(data):,} bytes, at most {limit:,} are allowed")
    view = memoryview(data)
    if len(view) < 12 or bytes(view[:4]) != MAGIC:
        raise WireError("not a tensor frame: wrong magic")
    crc, size = struct.unpack("<II", view[4:12])
    if size > min(MAX_HEADER, len(view) - 12):
        raise WireError(f"header of {size:,} bytes in a frame of {len(view):,}")
    if zlib.crc32(view[8:]) != crc:
        raise WireError("checksum of the frame is wrong")
    try:
        header = msgspec.msgpack.decode(view[12 : 12 + size], type=_Header)
    except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError) as error:
        raise WireError(f"header of the frame: {error}") from None
    return _arrays(view, header, 12 + size, finite), header.meta


def _arrays(view: memoryview, header: _Header, at: int, finite: bool) -> Tensors:
    if len(header.tensors) > MAX_TENSORS:
        raise TooLarge(f"{len(header.tensors):,} tensors in one frame, at most {MAX_TENSORS:,}")
    out: Tensors = {}
    for name, kind, shape in header.tensors:
        if (
            kind not in DTYPES
            or len(name) > 512
            or len(shape) > 8
            or any(n < 0 for n in shape)
            or name in out
        ):
            raise WireError(f"tensor `{name[:80]}` with dtype `{kind[:8]}` and shape {shape[:9]}")
        count = 1
        for n in shape:
            count *= n
        width = np.dtype(DTYPES[kind]).itemsize
        if count * width > len(view) - at:
            raise WireError(f"tensor `{name}` needs {count * width:,} bytes, {len(view) - at:,} are left")
        array = np.frombuffer(view, DTYPES[kind], count, at).reshape(shape)
        if finite and kind[0] == "f" and not np.isfinite(array).all():
            raise NotFinite(f"tensor `{name}` holds NaN or infinity")
        out[name] = array
        at += count * width
    if at != len(view):
        raise WireError(f"{len(view) - at:,} bytes behind the last tensor")
    return out


def freeze(tree: Mapping[str, Any]) -> bytes:
    """A nested dictionary of arrays and plain values, such as a method's state, as one frame."""
    tensors: Tensors = {}

    def plain(value: Any) -> Any:
        if isinstance(value, np.ndarray):
            key = f"t{len(tensors)}"
            tensors[key] = value
            return {"\0": key}
        if isinstance(value, Mapping):
            return {str(k): plain(v) for k, v in value.items()}
        if isinstance(value, list | tuple):
            return [plain(v) for v in value]
        return value.item() if isinstance(value, np.generic) else value

    meta = plain(tree)
    return encode(tensors, meta)


def thaw(data: bytes) -> dict[str, Any]:
    """The inverse of `freeze`; arrays are writable copies."""
    tensors, meta = decode(data)

    def rich(value: Any) -> Any:
        if isinstance(value, dict):
            return (
                tensors[value["\0"]].copy()
                if set(value) == {"\0"}
                else {k: rich(v) for k, v in value.items()}
            )
        return [rich(v) for v in value] if isinstance(value, list) else value

    tree = rich(meta)
    if not isinstance(tree, dict):
        raise WireError("a state frame must hold a dictionary")
    return tree


def save(path: Path, tensors: Mapping[str, Array], meta: Any = None) -> None:
    """Write a frame so that a power cut leaves the old file or the new one."""
    write_atomic(path, encode(tensors, meta))


def open_frame(path: Path, *, finite: bool = False) -> tuple[Tensors, Any]:
    """Arrays of a frame on disk, memory-mapped: reading one module touches only its pages."""
    data: Any = np.memmap(path, dtype=np.uint8, mode="r")
    return decode(memoryview(data), finite=finite)
