"""A bad link in user space: a TCP relay with a rate, a delay, stalls, and cuts; agents behind it cannot be
reached from outside."""

import asyncio
import contextlib


class SlowLink:
    """Relays connections to `target`. Rates in bit/s for each direction, times in seconds; 0 means never
    or unlimited."""

    def __init__(
        self,
        target: tuple[str, int],
        *,
        rate: float = 0.0,
        delay: float = 0.0,
        stall_every: float = 0.0,
        stall: float = 0.0,
        cut_every: float = 0.0,
    ) -> None:
        self.target, self.rate, self.delay = target, rate, delay
        self.stall_every, self.stall, self.cut_every = stall_every, stall, cut_every
        self.up = self.down = self.cuts = self.connections = 0
        self.port = 0
        self._free = {"up": 0.0, "down": 0.0}
        self._open: set[asyncio.StreamWriter] = set()
        self._tasks: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> "SlowLink":
        self.loop = asyncio.get_running_loop()
        self.started = self.loop.time()
        self._server = await asyncio.start_server(self._connection, "127.0.0.1", 0, limit=1 << 16)
        self.port = self._server.sockets[0].getsockname()[1]
        if self.cut_every:
            self._spawn(self._cutting())
        return self

    async def __aexit__(self, *error: object) -> None:
        self._server.close()
        self.cut()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def cut(self) -> None:
        """End every connection now; what is under way is lost."""
        self.cuts += bool(self._open)
        for writer in list(self._open):
            writer.transport.abort()
        self._open.clear()

    async def _cutting(self) -> None:
        while True:
            await asyncio.sleep(self.cut_every)
            self.cut()

    def _spawn(self, work: object) -> None:
        task: asyncio.Task[None] = asyncio.create_task(work)  # type: ignore[arg-type]
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        try:
            there, back = await asyncio.open_connection(*self.target, limit=1 << 16)
        except OSError:
            writer.close()
            return
        self._open |= {writer, back}
        self._spawn(self._pump(reader, back, "up"))
        self._spawn(self._pump(there, writer, "down"))

    def _stalled(self, now: float) -> float:
        """Seconds until the link moves again."""
        since = (now - self.started) % self.stall_every if self.stall_every else 0.0
        return (
            max(0.0, self.stall - since)
            if self.stall_every and now - self.started > self.stall_every
            else 0.0
        )

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, way: str) -> None:
        """One direction: every block leaves when the link is free, and arrives `delay` later."""
        queue: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue(8)
        with contextlib.suppress(ConnectionError, OSError):
            arriving = asyncio.create_task(self._arrive(queue, writer))
            try:
                # What the relay itself has buffered behind a cut never was on the link.
                while (block := await reader.read(4096)) and not writer.is_closing():
                    now = self.loop.time()
                    start = max(now, self._free[way]) + self._stalled(now)
                    self._free[way] = start + (len(block) * 8 / self.rate if self.rate else 0.0)
                    setattr(self, way, getattr(self, way) + len(block))
                    await asyncio.sleep(max(0.0, self._free[way] - self.loop.time()))
                    await queue.put((self._free[way] + self.delay, block))
            finally:
                await queue.put((0.0, b""))
                await arriving
        self._open.discard(writer)

    async def _arrive(self, queue: asyncio.Queue[tuple[float, bytes]], writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError, OSError):
            while True:
                at, block = await queue.get()
                if not block:
                    break
                await asyncio.sleep(max(0.0, at - self.loop.time()))
                if writer.is_closing():
                    continue
                writer.write(block)
                await writer.drain()
        writer.close()
