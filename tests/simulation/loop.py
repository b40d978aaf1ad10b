"""An event loop whose clock jumps to the next event, and whose nodes can be cut off between any two of them.

Every callback belongs to the node (and the life of it) in whose context it was made. A node that was
killed never runs again: its tasks stay where they are, as after `kill -9`, and no `finally` of theirs is
carried out.
"""

import asyncio
import contextvars
import random
import selectors
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

EPOCH = 1_700_000_000.0


class Life:
    """One life of a node, from start to kill. `clock` is by how much its clock is wrong, in seconds."""

    def __init__(self, name: str) -> None:
        self.name, self.dead, self.clock = name, False, 0.0


LIFE: contextvars.ContextVar[Life | None] = contextvars.ContextVar("LIFE", default=None)


class Killed(BaseException):
    """The node was killed inside a step; nothing catches this but the task that it ends."""


class Stuck(Exception):
    """Nothing will ever happen again, or the time is over."""


class _Selector(selectors.BaseSelector):
    """Nothing to wait for but the clock."""

    def __init__(self) -> None:
        self.now = 0.0

    def select(self, timeout: float | None = None) -> list[Any]:
        if timeout is None:
            raise Stuck("nothing is scheduled any more")
        self.now += max(0.0, timeout)
        return []

    def register(self, fileobj: Any, events: int, data: Any = None) -> Any:
        return selectors.SelectorKey(fileobj, 0, events, data)

    def unregister(self, fileobj: Any) -> Any:
        return selectors.SelectorKey(fileobj, 0, 0, None)

    def get_map(self) -> Any:
        return {}


class VirtualLoop(asyncio.SelectorEventLoop):
    """`rng` decides how long work in threads takes; it is carried out in the loop, as one step."""

    def __init__(self, rng: random.Random, limit_s: float) -> None:
        self.virtual = _Selector()
        super().__init__(self.virtual)
        self.rng, self.limit_s = rng, limit_s
        self.set_exception_handler(self._quiet)
        self.errors: list[BaseException] = []

    def time(self) -> float:
        if self.virtual.now > self.limit_s:
            raise Stuck(f"not done after {self.limit_s:.0f} s")
        return self.virtual.now

    def _quiet(self, loop: Any, context: dict[str, Any]) -> None:
        error = context.get("exception")
        if error is not None and not isinstance(error, Killed):
            self.errors.append(error)

    def call_soon(self, callback: Any, *args: Any, context: contextvars.Context | None = None) -> Any:
        context = contextvars.copy_context() if context is None else context  # an empty one is false
        return super().call_soon(_guarded(callback, context), *args, context=context)

    def call_at(
        self, when: float, callback: Any, *args: Any, context: contextvars.Context | None = None
    ) -> Any:
        context = contextvars.copy_context() if context is None else context  # an empty one is false
        return super().call_at(when, _guarded(callback, context), *args, context=context)

    def run_in_executor(self, executor: Any, func: Callable[..., Any], *args: Any) -> asyncio.Future[Any]:  # type: ignore[override]
        future: asyncio.Future[Any] = self.create_future()

        def run() -> None:
            try:
                result = func(*args)
            except Exception as error:
                if not future.cancelled():
                    future.set_exception(error)
            else:
                if not future.cancelled():
                    future.set_result(result)

        self.call_later(self.rng.uniform(0.0, 0.004), run)
        return future


def _guarded(callback: Any, context: contextvars.Context) -> Any:
    life = context.get(LIFE)
    if life is None:
        return callback

    def run(*args: Any) -> None:
        if not life.dead:
            callback(*args)

    return run


@contextmanager
def virtual_time(loop: VirtualLoop) -> Iterator[None]:
    """`time` follows the loop; the clock that people read is wrong by what the running node's life says."""

    def wall() -> float:
        life = LIFE.get()
        return EPOCH + loop.virtual.now + (life.clock if life else 0.0)

    real = time.time, time.time_ns, time.monotonic
    time.time, time.time_ns, time.monotonic = wall, lambda: int(wall() * 1e9), lambda: loop.virtual.now
    try:
        yield
    finally:
        time.time, time.time_ns, time.monotonic = real
