"""Content-addressed transfer in small pieces, resumable on both sides.

A piece on the wire: version (u8), first 8 bytes of the blob's digest, number (u32), CRC-32 of the data
(u32), data. A half-arrived blob is a file with its pieces in place and a log of which are there: a kill at
any instant loses at most the half second before it, and what a power cut left behind is checked piece by
piece.
"""

import hashlib
import os
import struct
import time
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, NoReturn

from ..errors import WireError
from ..program.files import digest_of, digest_of_file, sync_folder
from .messages import PROTOCOL, Blob, Ranges

PIECE = struct.Struct(">B8sII")
RECORD = struct.Struct(">II")
"""Number and CRC-32 of a piece that is there."""
MAX_RANGES = 256
HOLD_S, HOLD_BYTES = 0.5, 4 << 20
"""Pieces stay in memory so long, and so many, before they are written: on a fast link a blob is one write."""


def piece(blob: Blob, number: int, data: bytes) -> bytes:
    """One piece as it travels."""
    return PIECE.pack(PROTOCOL, bytes.fromhex(blob.digest[:16]), number, zlib.crc32(data)) + data


def read_piece(payload: bytes) -> tuple[str, int, bytes]:
    """(first 16 hex digits of the digest, number, data). Raises WireError for a torn or altered piece."""
    if len(payload) < PIECE.size:
        raise WireError(f"a chunk of {len(payload)} bytes is shorter than its header")
    version, prefix, number, crc = PIECE.unpack_from(payload)
    if version != PROTOCOL:
        raise WireError(f"a chunk of protocol {version}, this side speaks {PROTOCOL}")
    data = payload[PIECE.size :]
    if zlib.crc32(data) != crc:
        raise WireError(f"chunk {number} is corrupted: its checksum is wrong")
    return prefix.hex(), number, data


def blob_of(data: bytes, chunk: int) -> Blob:
    """The address of `data`, cut into pieces so that each packet stays within `chunk` bytes with its
    header."""
    return Blob(digest_of(data), len(data), max(1, chunk - PIECE.size))


def ranges(numbers: Iterable[int]) -> Ranges:
    """Sorted numbers as half-open ranges, at most `MAX_RANGES` of them: the rest is asked for later."""
    found: Ranges = []
    for n in sorted(numbers):
        if found and found[-1][1] == n:
            found[-1] = (found[-1][0], n + 1)
        elif len(found) == MAX_RANGES:
            break
        else:
            found.append((n, n + 1))
    return found


def numbers(spans: Ranges, below: int) -> Iterator[int]:
    """Numbers in ranges, cut at `below`, so that a hostile range costs nothing."""
    for start, stop in spans[:MAX_RANGES]:
        yield from range(max(0, start), min(stop, below))


class Assembly:
    """A blob that is arriving: pieces in their places in `<digest>.part`, and in `<digest>.have` a log of
    which are there."""

    def __init__(
        self, folder: Path, blob: Blob, *, durable: bool = True, hold_bytes: int = HOLD_BYTES
    ) -> None:
        self.hold_bytes = hold_bytes
        self.blob, self.target, self.durable = blob, folder / blob.digest, durable
        self.path, self.log = folder / f"{blob.digest}.part", folder / f"{blob.digest}.have"
        self.have: set[int] = set()
        self.repeated = 0
        self._hash, self._hashed = hashlib.sha256(), 0
        self._fresh: dict[int, bytes] = {}
        self._since = time.monotonic()
        folder.mkdir(parents=True, exist_ok=True)
        if self.log.exists():
            self._replay()
        self.resumed = len(self.have)

    def _replay(self) -> None:
        """What the log names and the file really holds; a torn record or piece is as if it had not come."""
        if not self.path.exists():
            self.log.unlink(missing_ok=True)
            return
        log = self.log.read_bytes()
        whole = len(log) // RECORD.size * RECORD.size
        with self.path.open("rb") as part:
            for number, crc in RECORD.iter_unpack(log[:whole]):
                if number < self.blob.chunks and zlib.crc32(self._read(part, number)) == crc:
                    self.have.add(number)
        if whole < len(log):
            os.truncate(self.log, whole)

    def _read(self, part: IO[bytes], number: int) -> bytes:
        part.seek(number * self.blob.chunk)
        return part.read(self._length(number))

    def _length(self, number: int) -> int:
        return (
            self.blob.size - number * self.blob.chunk if number == self.blob.chunks - 1 else self.blob.chunk
        )

    def add(self, number: int, data: bytes) -> bool:
        """Keep one piece; False for one that is here already. Raises WireError for a piece that cannot
        belong here."""
        if not 0 <= number < self.blob.chunks or len(data) != self._length(number):
            raise WireError(
                f"chunk {number} with {len(data):,} bytes does not fit a blob of {self.blob.chunks} chunks "
                f"of {self.blob.chunk:,} bytes"
            )
        if number in self.have:
            self.repeated += 1
            return False
        self._fresh[number] = data
        self.have.add(number)
        if number == self._hashed:
            self._hash.update(data)
            self._hashed += 1
        now = time.monotonic()
        if not self.complete and (
            now - self._since > HOLD_S or len(self._fresh) * self.blob.chunk > self.hold_bytes
        ):
            self.save()
        return True

    def save(self) -> None:
        """Bring pieces that are only in memory to disk, in place, and then into the log."""
        self._since = time.monotonic()
        if not self._fresh:
            return
        with self.path.open("r+b" if self.path.exists() else "w+b") as part:
            for number, data in self._fresh.items():
                part.seek(number * self.blob.chunk)
                part.write(data)
        with self.log.open("ab") as log:
            log.write(b"".join(RECORD.pack(number, zlib.crc32(data)) for number, data in self._fresh.items()))
        self._fresh.clear()

    def missing(self) -> Ranges:
        """What has not arrived."""
        return ranges(n for n in range(self.blob.chunks) if n not in self.have)

    @property
    def complete(self) -> bool:
        """Has every piece arrived?"""
        return len(self.have) == self.blob.chunks

    def whole(self) -> bytes | None:
        """The content, where every piece came in this life and none has been written yet; None where
        `finish` must look at the disk.

        Raises WireError and starts over if the digest is wrong.
        """
        if len(self._fresh) < self.blob.chunks:
            return None
        data = b"".join(self._fresh[n] for n in range(self.blob.chunks))
        right = (
            self._hash.hexdigest() if self._hashed == self.blob.chunks else digest_of(data)
        ) == self.blob.digest
        self._restart_hash()
        if not right:
            self._wrong()
        self.forget()
        return data

    def finish(self) -> Path:
        """Check the digest and put the blob in its place, durably if so wished. Raises WireError and
        starts over if it is wrong."""
        with self.path.open("r+b" if self.path.exists() else "w+b") as part:
            for number, data in self._fresh.items():
                part.seek(number * self.blob.chunk)
                part.write(data)
            self._fresh.clear()
            while self._hashed < self.blob.chunks:
                self._hash.update(self._read(part, self._hashed))
                self._hashed += 1
            if self.durable:
                part.flush()
                os.fsync(part.fileno())
        right = self._hash.hexdigest() == self.blob.digest
        self._restart_hash()
        if not right:
            self._wrong()
        os.replace(self.path, self.target)
        self.log.unlink(missing_ok=True)
        if self.durable:
            sync_folder(self.path.parent)
        return self.target

    def _restart_hash(self) -> None:
        self._hash, self._hashed = hashlib.sha256(), 0

    def _wrong(self) -> NoReturn:
        self.forget()
        raise WireError(f"blob {self.blob.digest[:12]} arrived with another digest", "it is fetched again")

    def forget(self) -> None:
        """Start over."""
        self.path.unlink(missing_ok=True)
        self.log.unlink(missing_ok=True)
        self.have.clear()
        self._fresh.clear()


def stored(folder: Path, digest: str) -> Path | None:
    """The blob in `folder`, if it is there and undamaged; a damaged one is removed."""
    path = folder / digest
    if not path.exists():
        return None
    if digest_of_file(path) == digest:
        return path
    path.unlink(missing_ok=True)
    return None


def cut(data: bytes, blob: Blob, number: int) -> bytes:
    """Piece `number` of `data`, ready to publish."""
    return piece(blob, number, data[number * blob.chunk : (number + 1) * blob.chunk])
