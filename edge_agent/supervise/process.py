"""The training process from outside: start it, watch its memory, hear its answers, end it when idle."""

import asyncio
import contextlib
import sys
from collections.abc import Callable
from typing import Any, Protocol

import msgspec
import psutil

from rankfleet.federated.program.within import within

from ..order import Order

Progress = Callable[[dict[str, Any]], None]
START_S = 180.0
LEAVE_S = 0.8


class EngineFailed(Exception):
    """An order that could not be carried out; `code` is `memory`, `data`, `job` or `crash`.

    `again`: somebody else killed the worker. That may have been chance, so the order is worth another try.
    """

    def __init__(self, code: str, reason: str, again: bool = False) -> None:
        super().__init__(reason)
        self.code, self.again = code, again


class Engine(Protocol):
    """Carries out orders."""

    async def run(self, order: Order, progress: Progress) -> None:
        """Leave the result in the order's folder. Raises EngineFailed."""

    async def stop(self) -> None:
        """End whatever is running."""


class ProcessEngine:
    """A worker process that is started at the first order and stays until `stop` or `idle_s` without work."""

    def __init__(
        self, *, memory_mb: float | None, idle_s: float, module: str = "rankfleet.edge_agent.worker"
    ) -> None:
        self.memory_mb, self.idle_s, self.module = memory_mb, idle_s, module
        self._process: asyncio.subprocess.Process | None = None
        self._working = self._paused = self._halting = False
        self._rss_mb = 0.0
        self._idle: asyncio.TimerHandle | None = None
        self._stopping: asyncio.Task[None] | None = None

    async def run(self, order: Order, progress: Progress) -> None:
        """One order; a worker that dies or grows over its limit is an EngineFailed."""
        if self._idle:
            self._idle.cancel()
        try:
            process = await self._started()
            limit = self._rss_mb + (self.memory_mb or 1000.0 + 4 * order.budget_mb)
            assert process.stdin is not None
            process.stdin.write(msgspec.json.encode(order) + b"\n")
            await process.stdin.drain()
            watch = asyncio.create_task(self._watch(process, limit), name="memory-watch")
            self._working = True
            try:
                await self._answers(process, progress)
            except EngineFailed as failed:
                if watch.done() and not watch.cancelled():
                    raise EngineFailed(
                        "memory", f"the worker took more than {limit:.0f} MB and was stopped"
                    ) from None
                raise failed
            finally:
                if watch.done() and not watch.cancelled():
                    await (
                        self.stop()
                    )  # it was killed, and may have answered before: the next order must not find it dying
                self._working = False
                watch.cancel()
        except (BrokenPipeError, ConnectionResetError) as error:
            await self.stop()
            raise EngineFailed("crash", f"the worker went away: {error}") from None
        finally:
            self._idle = asyncio.get_running_loop().call_later(self.idle_s, self._idle_stop)

    async def _started(self) -> asyncio.subprocess.Process:
        if self._process is None or self._process.returncode is not None:
            self._process = await asyncio.create_subprocess_exec(
                sys.executable,
                "-m",
                self.module,
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                limit=1 << 20,
            )
            first = await within(START_S, self._line(self._process))
            self._rss_mb = float(first.get("rss_mb", 0.0))
        return self._process

    async def _answers(self, process: asyncio.subprocess.Process, progress: Progress) -> None:
        while True:
            told = await self._line(process)
            event = told.pop("event", "")
            if event == "progress":
                progress(told)
            elif event == "done":
                return
            elif event == "failed":
                self._halting = False
                raise EngineFailed(told["code"], told["reason"])

    async def _line(self, process: asyncio.subprocess.Process) -> dict[str, Any]:
        assert process.stdout is not None
        line = await process.stdout.readline()
        if not line:
            code = await process.wait()
            self._process = None
            if self._halting:
                self._halting = False
                raise EngineFailed("halted", "the worker was told to leave")
            killed = code in (-9, 137)
            raise EngineFailed(
                "memory" if killed else "crash",
                "the worker was killed (signal 9), most likely for memory"
                if killed
                else f"the worker ended with code {code}; its messages are in the agent's log",
                again=killed,
            )
        told: dict[str, Any] = msgspec.json.decode(line)
        return told

    async def _watch(self, process: asyncio.subprocess.Process, limit_mb: float) -> None:
        """Ends by killing a worker that is over its limit; RLIMIT_AS means nothing to torch."""
        with contextlib.suppress(psutil.Error):
            seen = psutil.Process(process.pid)
            while seen.memory_info().rss / (1 << 20) <= limit_mb:
                await asyncio.sleep(0.1)
            process.kill()
            return
        await asyncio.Event().wait()

    def _idle_stop(self) -> None:
        self._stopping = asyncio.get_running_loop().create_task(self.stop(), name="worker-idle")

    @property
    def pid(self) -> int | None:
        """The worker's process."""
        return None if self._process is None else self._process.pid

    async def leave(self) -> None:
        """Let the worker write down where it is and end; the order then fails with the code `halted`."""
        process = self._process
        self._halting = True
        self.resume()
        if process is not None and process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                process.terminate()
                with contextlib.suppress(asyncio.TimeoutError):
                    await within(LEAVE_S, process.wait())
                    return
                process.kill()
                await process.wait()

    def pause(self) -> None:
        """Stop computing now, in the middle of a step if need be; memory stays."""
        if self._process is not None and not self._paused:
            self._paused = True
            with contextlib.suppress(psutil.Error):
                psutil.Process(self._process.pid).suspend()

    def resume(self) -> None:
        """Go on."""
        if self._process is not None and self._paused:
            with contextlib.suppress(psutil.Error):
                psutil.Process(self._process.pid).resume()
        self._paused = False

    async def stop(self) -> None:
        """End the worker. One in the middle of a round has a moment to write down where it is; then it is
        killed."""
        if self._idle:
            self._idle.cancel()
        self.resume()
        process, self._process = self._process, None
        if process is None or process.returncode is not None:
            return
        with contextlib.suppress(ProcessLookupError):
            if self._working:
                process.terminate()
                with contextlib.suppress(asyncio.TimeoutError):
                    await within(LEAVE_S, process.wait())
                    return
            process.kill()
        await process.wait()
