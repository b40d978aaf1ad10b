"""Content-addressed transfer in small pieces, resumable on both sides.

A piece on the wire: version (u8), first 8 bytes of the blob's digest, number (u32), CRC-32 of the data (u32), data.
A half-arrived blob is a log of such records on disk: a kill at any instant loses at most the piece being written, and a torn
record at the end is cut off when the log is opened.
"""

import struct
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path

from .errors import WireError
from .files import digest_of, digest_of_file, sync_folder, write_atomic
from .messages import PROTOCOL, Blob, Ranges

PIECE = struct.Struct(">B8sII")
RECORD = struct.Struct(">III")
MAX_RANGES = 256


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
    """The address of `data`, cut into pieces so that each packet stays within `chunk` bytes with its header."""
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
    """A blob that is arriving, as a log on disk."""

    def __init__(self, folder: Path, blob: Blob) -> None:
        self.blob, self.path = blob, folder / f"{blob.digest}.part"
        self.target = folder / blob.digest
        self.have: dict[int, int] = {}
        self.repeated = 0
        folder.mkdir(parents=True, exist_ok=True)
        if self.path.exists():
            self._replay()
        self.resumed = len(self.have)

    def _replay(self) -> None:
        at, size = 0, self.path.stat().st_size
        with self.path.open("rb") as log:
            while at + RECORD.size <= size:
                number, crc, length = RECORD.unpack(log.read(RECORD.size))
                data = log.read(length) if length <= self.blob.chunk else b""
                if len(data) != length or zlib.crc32(data) != crc or number >= self.blob.chunks:
                    break
                self.have[number] = at + RECORD.size
                at += RECORD.size + length
        if at < size:
            with self.path.open("r+b") as log:
                log.truncate(at)

    def add(self, number: int, data: bytes) -> bool:
        """Keep one piece; False for one that is here already. Raises WireError for a piece that cannot belong here."""
        last = number == self.blob.chunks - 1
        want = self.blob.size - number * self.blob.chunk if last else self.blob.chunk
        if number >= self.blob.chunks or len(data) != want:
            raise WireError(
                f"chunk {number} with {len(data):,} bytes does not fit a blob of {self.blob.chunks} chunks of {self.blob.chunk:,} bytes"
            )
        if number in self.have:
            self.repeated += 1
            return False
        with self.path.open("ab") as log:
            at = log.tell()
            log.write(RECORD.pack(number, zlib.crc32(data), len(data)) + data)
        self.have[number] = at + RECORD.size
        return True

    def missing(self) -> Ranges:
        """What has not arrived."""
        return ranges(n for n in range(self.blob.chunks) if n not in self.have)

    @property
    def complete(self) -> bool:
        """Has every piece arrived?"""
        return len(self.have) == self.blob.chunks

    def finish(self) -> Path:
        """Check the digest and put the blob in its place, durably. Raises WireError and starts over if it is wrong."""
        with self.path.open("rb") as log:
            pieces = []
            for number in range(self.blob.chunks):
                log.seek(self.have[number])
                last = number == self.blob.chunks - 1
                pieces.append(log.read(self.blob.size - number * self.blob.chunk if last else self.blob.chunk))
        data = b"".join(pieces)
        if digest_of(data) != self.blob.digest:
            self.path.unlink(missing_ok=True)
            self.have.clear()
            raise WireError(f"blob {self.blob.digest[:12]} arrived with another digest", "it is fetched again")
        write_atomic(self.target, data)
        self.path.unlink(missing_ok=True)
        sync_folder(self.path.parent)
        return self.target


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
