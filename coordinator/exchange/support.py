"""Asks a device for its log or its doctor's findings, and waits for the answer."""

import asyncio
from collections.abc import Callable
from typing import Literal

from rankfleet.federated.errors import ConfigError, Unreachable
from rankfleet.federated.program.within import within
from rankfleet.federated.wire.messages import Ask, Bundle, Message

from ..fleet.devices import Devices

PATIENCE_S = 90.0
MOST = 64 << 10


class Support:
    """Questions that are open, by number."""

    def __init__(self, devices: Devices, send: Callable[[str, Message], None]) -> None:
        self.devices, self.send = devices, send
        self._number = 0
        self._open: dict[tuple[str, int], asyncio.Future[str]] = {}

    async def ask(self, device: str, what: Literal["logs", "doctor"], patience_s: float = PATIENCE_S) -> str:
        """The device's answer. Raises ConfigError for a stranger, Unreachable where none comes."""
        if not self.devices.enrolled(device):
            raise ConfigError(f"device `{device}` is not enrolled", "coordinator devices")
        self._number += 1
        key = (device, self._number)
        self._open[key] = asyncio.get_running_loop().create_future()
        self.send(device, Ask(self._number, what))
        try:
            return await within(patience_s, _result(self._open[key]))
        except asyncio.TimeoutError:
            raise Unreachable(
                f"`{device}` does not answer", "is it on? `coordinator devices` says when it was seen"
            ) from None
        finally:
            del self._open[key]

    def answered(self, device: str, bundle: Bundle) -> None:
        """An answer; one that nobody waits for is forgotten."""
        future = self._open.get((device, bundle.number))
        if future is not None and not future.done():
            future.set_result(bundle.text[:MOST])


async def _result(future: "asyncio.Future[str]") -> str:
    return await future
