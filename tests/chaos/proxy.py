"""A proxy between an agent and the broker that reads MQTT frames, and loses, doubles, delays, swaps and
tears what is published.

A frame that it loses is acknowledged all the same, as brokers do that drop silently: a PUBACK proves nothing.
"""

import asyncio
import contextlib
import random
from collections import Counter

PUBLISH, PUBACK = 3, 4


class Proxy:
    """Listens on `port` (0: a free one). While `wild` is positive, it is the probability that something
    happens to a frame."""

    def __init__(self, broker_port: int, rng: random.Random) -> None:
        self.broker_port, self.rng = broker_port, rng
        self.port, self.wild = 0, 0.0
        self.done: Counter[str] = Counter()
        self._server: asyncio.Server | None = None
        self._writers: set[asyncio.StreamWriter] = set()
        self._tasks: set[asyncio.Task[None]] = set()

    async def start(self) -> None:
        self._server = await asyncio.start_server(self._client, "127.0.0.1", 0)
        self.port = self._server.sockets[0].getsockname()[1]

    async def stop(self) -> None:
        if self._server:
            self._server.close()
        self.cut()
        for task in list(self._tasks):
            task.cancel()

    def cut(self) -> None:
        """Every connection through here ends."""
        for writer in list(self._writers):
            writer.close()

    async def _client(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            up_reader, up_writer = await asyncio.open_connection("127.0.0.1", self.broker_port)
        except OSError:
            writer.close()
            return
        self._writers |= {writer, up_writer}
        ways = [
            asyncio.create_task(self._way(reader, up_writer, writer), name="up"),
            asyncio.create_task(self._way(up_reader, writer, up_writer), name="down"),
        ]
        self._tasks |= set(ways)
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
        for way in ways:
            way.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.gather(*ways, return_exceptions=True)
        self._tasks -= set(ways)
        for end in (writer, up_writer):
            self._writers.discard(end)
            end.close()

    async def _way(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, back: asyncio.StreamWriter
    ) -> None:
        held = b""
        with contextlib.suppress(OSError, asyncio.IncompleteReadError):
            while True:
                frame, at = await _frame(reader)
                sent = await self._fate(frame, at, back)
                if sent is None:
                    held = frame
                    continue
                for one in (*sent, *([held] if held and sent else [])):
                    writer.write(one)
                held = b"" if sent else held
                await writer.drain()

    async def _fate(self, frame: bytes, at: int, back: asyncio.StreamWriter) -> "list[bytes] | None":
        """What is passed on instead of a frame; None: it waits for the next one."""
        if frame[0] >> 4 != PUBLISH or self.rng.random() >= self.wild:
            return [frame]
        fate = self.rng.choice(["lost", "doubled", "delayed", "swapped", "torn"])
        self.done[fate] += 1
        topic = int.from_bytes(frame[at : at + 2], "big")
        quality = frame[0] >> 1 & 3
        number = frame[at + 2 + topic : at + 4 + topic] if quality else b""
        if fate == "lost":
            if number:
                back.write(bytes([PUBACK << 4, 2]) + number)
            return []
        if fate == "delayed":
            await asyncio.sleep(self.rng.uniform(0.1, 1.5))
        if fate == "swapped":
            return None
        start = at + 2 + topic + len(number) + 1  # behind the (empty) properties of MQTT 5
        if fate == "torn" and start < len(frame):
            spot = self.rng.randrange(start, len(frame))
            return [frame[:spot] + bytes([frame[spot] ^ 1]) + frame[spot + 1 :]]
        return [frame, frame] if fate == "doubled" else [frame]


async def _frame(reader: asyncio.StreamReader) -> tuple[bytes, int]:
    """A whole MQTT packet, and where its variable header begins."""
    head = await reader.readexactly(1)
    size, shift = 0, 0
    while True:
        byte = await reader.readexactly(1)
        head += byte
        size |= (byte[0] & 127) << shift
        shift += 7
        if byte[0] < 128:
            return head + await reader.readexactly(size), len(head)
