"""Downloads by demand: wants are gathered for a moment, then each missing piece is published once for all
who asked."""

import asyncio
import contextlib
import logging
from pathlib import Path

from rankfleet.federated.program.files import write_atomic
from rankfleet.federated.program.within import within
from rankfleet.federated.transport.bus import Bus
from rankfleet.federated.transport.topics import Topics
from rankfleet.federated.wire.messages import Blob, Ranges
from rankfleet.federated.wire.transfer import blob_of, cut, numbers

log = logging.getLogger(__name__)


class Blobs:
    """Everything that devices may fetch, by digest, in one folder."""

    def __init__(self, bus: Bus, topics: Topics, folder: Path, packet: int, gather_ms: float) -> None:
        self.bus, self.topics, self.folder, self.packet, self.gather_s = (
            bus,
            topics,
            folder,
            packet,
            gather_ms / 1e3,
        )
        self._known: dict[str, Blob] = {}
        self._wanted: dict[str, set[int]] = {}
        self._asked: dict[str, int] = {}
        self._expected: dict[str, int] = {}
        self._all: dict[str, asyncio.Event] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    def put(self, data: bytes) -> Blob:
        """Keep `data` on disk and return its address."""
        blob = blob_of(data, min(self.packet, self.bus.packet))
        path = self.folder / blob.digest
        if not path.exists():
            write_atomic(path, data)
        self._known[blob.digest] = blob
        return blob

    def know(self, blob: Blob) -> None:
        """An address from an earlier life of this service."""
        if (self.folder / blob.digest).exists():
            self._known[blob.digest] = blob

    def path(self, digest: str) -> Path:
        """Where the content lies."""
        return self.folder / digest

    def expect(self, digest: str, devices: int) -> None:
        """So many devices will ask for it soon: once all have, nobody is waited for."""
        self._expected[digest] = devices

    def want(self, digest: str, missing: Ranges) -> None:
        """Someone asks for pieces; unknown digests are ignored."""
        blob = self._known.get(digest)
        if blob is None:
            log.warning("a device wants blob %s, which is not offered", digest[:12])
            return
        waiting = digest in self._wanted
        self._asked[digest] = self._asked.get(digest, 0) + 1
        if self._asked[digest] >= self._expected.get(digest, 1 << 30) and digest in self._all:
            self._all[digest].set()
        self._wanted.setdefault(digest, set()).update(numbers(missing, blob.chunks))
        if not waiting:
            task = asyncio.create_task(self._publish(blob), name=f"blob-{digest[:8]}")
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _publish(self, blob: Blob) -> None:
        everyone = self._all[blob.digest] = asyncio.Event()
        if self._asked[blob.digest] < self._expected.get(blob.digest, 1 << 30):
            with contextlib.suppress(asyncio.TimeoutError):
                await within(self.gather_s, everyone.wait())
        self._expected[blob.digest] = max(1, self._expected.get(blob.digest, 1) - self._asked[blob.digest])
        self._asked[blob.digest] = 0
        pieces = sorted(self._wanted.pop(blob.digest, set()))
        try:
            data = (self.folder / blob.digest).read_bytes()
        except OSError as error:
            log.error("blob %s: %s", blob.digest[:12], error)
            return
        for number in pieces:
            await self.bus.publish(self.topics.blob(blob.digest), cut(data, blob, number))

    def forget(self, keep: set[str]) -> None:
        """Remove what no live version needs."""
        for path in list(self.folder.glob("*")) if self.folder.exists() else []:
            if path.name not in keep:
                path.unlink(missing_ok=True)
                for table in (self._known, self._asked, self._expected, self._all):
                    table.pop(path.name, None)
