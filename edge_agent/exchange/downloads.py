"""Downloads by demand: subscribe to a blob's topic, say which pieces are missing, keep what arrives."""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

from rankfleet.federated.errors import WireError
from rankfleet.federated.program.within import within
from rankfleet.federated.transport.bus import Bus
from rankfleet.federated.transport.topics import Topics
from rankfleet.federated.wire.messages import Blob, Want
from rankfleet.federated.wire.transfer import Assembly, read_piece, stored

log = logging.getLogger(__name__)
MAX_BLOB = 2 << 30
SLACK, LONGEST_S = 4.0, 120.0
"""How much longer than usual a piece may take before it is asked for again, and the longest wait."""


class Fetcher:
    """Blobs of this device, in `folder`, by digest."""

    def __init__(
        self, bus: Bus, topics: Topics, folder: Path, say: Callable[[Want], Awaitable[None]], answer_s: float
    ) -> None:
        self.bus, self.topics, self.folder, self.say, self.answer_s = bus, topics, folder, say, answer_s
        self.resumed = 0
        self._connection = 0
        self._waiting: set[asyncio.Event] = set()
        self._piece_s = 0.0
        """How long a piece takes on this link, smoothed."""
        self.kbps: float | None = None

    def wake(self) -> None:
        """The connection is new: what was under way is lost, and asked for at once."""
        self._connection += 1
        for news in self._waiting:
            news.set()

    async def get(self, blob: Blob) -> Path:
        """The blob's file, fetched if it is not here. Tries until it has every piece."""
        if blob.size > MAX_BLOB:
            raise WireError(f"a blob of {blob.size:,} bytes, at most {MAX_BLOB:,} are fetched")
        if path := stored(self.folder, blob.digest):
            return path
        assembly = Assembly(self.folder, blob, durable=False)
        self.resumed += assembly.resumed
        news = asyncio.Event()

        def take(topic: str, payload: bytes) -> None:
            try:
                prefix, number, data = read_piece(payload)
                if blob.digest.startswith(prefix) and assembly.add(number, data):
                    news.set()
            except (WireError, OSError) as error:
                log.warning("a piece of %s was dropped: %s", blob.digest[:12], error)

        self._waiting.add(news)
        topic = self.topics.blob(blob.digest)
        await self.bus.subscribe(topic, take)
        try:
            return await self._complete(blob, assembly, news)
        finally:
            self._waiting.discard(news)
            assembly.save()
            await self.bus.unsubscribe(topic)

    async def _complete(self, blob: Blob, assembly: Assembly, news: asyncio.Event) -> Path:
        wait = 0.0
        while True:
            while not assembly.complete:
                await self.say(Want(blob.digest, assembly.missing()))
                connection = self._connection
                while not assembly.complete and connection == self._connection:
                    news.clear()
                    asked = time.monotonic()
                    try:
                        await within(max(self.answer_s, wait, SLACK * self._piece_s), news.wait())
                        self._piece_s += 0.3 * (time.monotonic() - asked - self._piece_s)
                        wait = 0.0
                    except asyncio.TimeoutError:
                        # A slow link is not asked for the same pieces again and again: they are already
                        # queued for it.
                        wait = min(LONGEST_S, 2 * max(wait, self.answer_s))
                        assembly.save()
                        break
            try:
                path = assembly.finish()
            except WireError as error:
                log.warning("%s", error)
                continue
            if self.kbps:
                await asyncio.sleep(blob.size * 8 / (self.kbps * 1e3))
            return path

    def forget(self, keep: set[str]) -> None:
        """Remove blobs that no assignment names any more."""
        for path in self.folder.glob("*") if self.folder.exists() else ():
            if path.name.removesuffix(".part").removesuffix(".have") not in keep:
                path.unlink(missing_ok=True)
