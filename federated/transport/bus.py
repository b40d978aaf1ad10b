"""The bus: publish and subscribe with at-least-once delivery. `MemoryBus` here, MQTT in `mqtt.py`.

Nothing above the bus may trust it: messages may be lost, doubled and reordered, and an acknowledged
publish may still have been dropped by a broker. Every exchange ends in an answer of the other side or is
tried again.
"""

import asyncio
from collections.abc import Callable
from typing import Protocol

Handler = Callable[[str, bytes], None]
"""Called in the event loop with topic and payload; must not block."""
PACKET = 120_000
"""Largest packet, header included, unless a broker is known to take more."""


class Bus(Protocol):
    """A connection to a broker."""

    connected: asyncio.Event
    on_connect: list[Callable[[], None]]
    sent: int
    received: int
    packet: int

    async def start(self) -> None:
        """Begin to connect; returns at once."""

    async def stop(self) -> None:
        """Disconnect."""

    async def subscribe(self, pattern: str, handler: Handler) -> None:
        """Deliver messages on `pattern` to `handler`, now and after every reconnect."""

    async def unsubscribe(self, pattern: str) -> None:
        """Stop delivering `pattern`."""

    async def publish(self, topic: str, payload: bytes, retain: bool = False, again: bool = True) -> bool:
        """Wait until a broker has taken the message; over lost connections too, unless not `again`: then
        False."""
