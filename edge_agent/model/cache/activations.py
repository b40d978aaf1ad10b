"""What the frozen, unchanging lower layers put out for an example: made once, kept in fp16, used by later
epochs and rounds.

Identity, conditions and precision: docs/specification.md (Activation cache). Entries are named by their
tokens; a store by everything that could change what is in it: model, bits, kept channels and frozen
adapters below the boundary, and the boundary itself. Memory first, then a file that is appended to: every
record has its length and checksum, so that a torn one is made again.
"""

import hashlib
import logging
import os
import struct
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

log = logging.getLogger(__name__)
FORMAT = 2
RECORD = struct.Struct("<qII")
"""Key, rows, checksum."""


def example_key(ids: Sequence[int]) -> int:
    """Name of an example: what its tokens are, in 64 bits."""
    digest = hashlib.blake2b(np.asarray(ids, "<i8").tobytes(), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)


class Activations:
    """Rows of hidden states by example, for one boundary of one prepared model. `name` is its identity."""

    def __init__(
        self, name: str, hidden: int, memory_mb: float, folder: Path | None = None, disk_mb: float = 0.0
    ) -> None:
        self.name, self.hidden, self.folder = name, hidden, folder
        self.memory_left, self.disk_left = memory_mb * 1e6, disk_mb * 1e6
        self.written = self.hits = self.made = 0
        self._memory: dict[int, Tensor] = {}
        self._disk: dict[int, tuple[int, int]] = {}
        """Key → (offset, rows)."""
        self._end = 0
        if folder is not None and disk_mb > 0:
            self._open(folder)

    def __contains__(self, key: int) -> bool:
        return key in self._memory or key in self._disk

    def __len__(self) -> int:
        return len(self._memory) + len(self._disk)

    def get(self, key: int) -> Tensor | None:
        """Rows (n, hidden) fp16 of an example; None where it has to be made."""
        if key in self._memory:
            self.hits += 1
            return self._memory[key]
        if key not in self._disk:
            return None
        offset, rows = self._disk[key]
        found = self._read(offset, key, rows)
        if found is None:
            del self._disk[key]
            return None
        self.hits += 1
        return found

    def put(self, key: int, rows: Tensor) -> None:
        """Keep the rows (n, hidden) fp16 of an example, if there is room."""
        self.made += 1
        if key in self:
            return
        size = rows.numel() * 2
        if size <= self.memory_left:
            self.memory_left -= size
            self._memory[key] = rows.clone()
        elif self.folder is not None and size + RECORD.size <= self.disk_left:
            self._append(key, rows)

    @property
    def path(self) -> Path | None:
        """The file behind it."""
        return None if self.folder is None else self.folder / f"{self.name}.act"

    def _open(self, folder: Path) -> None:
        """Read the index of what an earlier life left; other stores of this folder are out of date."""
        folder.mkdir(parents=True, exist_ok=True)
        os.chmod(folder, 0o700)
        assert self.path is not None
        for old in folder.glob("*.act"):
            if old != self.path:
                old.unlink(missing_ok=True)
        if not self.path.exists():
            return
        size = self.path.stat().st_size
        with self.path.open("rb") as file:
            while self._end + RECORD.size <= size:
                file.seek(self._end)
                key, rows, _ = RECORD.unpack(file.read(RECORD.size))
                after = self._end + RECORD.size + rows * self.hidden * 2
                if after > size:
                    break
                self._disk[key] = (self._end, rows)
                self._end = after
        self.disk_left -= self._end
        if self._end < size:
            log.warning("%s: %d bytes of a torn record are dropped", self.path, size - self._end)
            os.truncate(self.path, self._end)

    def _append(self, key: int, rows: Tensor) -> None:
        assert self.path is not None
        data = rows.contiguous().numpy().tobytes()
        head = RECORD.pack(
            key, rows.shape[0], zlib.crc32(data, zlib.crc32(struct.pack("<qI", key, rows.shape[0])))
        )
        try:
            with self.path.open("ab") as file:
                file.write(head + data)
        except OSError as error:
            self.disk_left = 0.0
            log.warning("the activation cache grows no more on disk: %s", error)
            os.truncate(self.path, self._end)
            return
        self._disk[key] = (self._end, rows.shape[0])
        self._end += len(head) + len(data)
        self.disk_left -= len(head) + len(data)
        self.written += len(head) + len(data)

    def _read(self, offset: int, key: int, rows: int) -> Tensor | None:
        """One record, if it is whole and the one that was asked for."""
        assert self.path is not None
        try:
            with self.path.open("rb") as file:
                file.seek(offset)
                head = file.read(RECORD.size)
                data = file.read(rows * self.hidden * 2)
            said, count, checksum = RECORD.unpack(head)
        except (OSError, struct.error):
            return None
        if (said, count) != (key, rows) or zlib.crc32(
            data, zlib.crc32(struct.pack("<qI", key, rows))
        ) != checksum:
            log.warning(
                "%s: a record at byte %d is damaged; the example is computed again", self.path, offset
            )
            return None
        return torch.from_numpy(np.frombuffer(data, np.float16).reshape(rows, self.hidden).copy())
