"""A broker and its connections in one process, for tests and simulations."""

import asyncio
import random
from collections.abc import Callable

from .bus import PACKET, Handler
from .topics import matches


class MemoryBroker:
    """A broker in one process, with retained messages and faults from a seed."""

    def __init__(
        self, *, drop: float = 0.0, double: float = 0.0, reorder: float = 0.0, seed: int = 0
    ) -> None:
        self.drop, self.double, self.reorder = drop, double, reorder
        self.rng = random.Random(seed)
        self.retained: dict[str, bytes] = {}
        self.clients: list[MemoryBus] = []

    def deliver(self, topic: str, payload: bytes, retain: bool) -> None:
        """To every client that subscribed, faults included."""
        if retain:
            self.retained.pop(topic, None)
            if payload:
                self.retained[topic] = payload
        times = 0 if self.rng.random() < self.drop else 2 if self.rng.random() < self.double else 1
        for client in list(self.clients):
            for _ in range(times):
                late = self.rng.random() < self.reorder
                asyncio.get_running_loop().call_later(0.05 if late else 0.001, client.take, topic, payload)


class MemoryBus:
    """One client of a `MemoryBroker`."""

    def __init__(self, broker: MemoryBroker) -> None:
        self.broker = broker
        self.connected = asyncio.Event()
        self.on_connect: list[Callable[[], None]] = []
        self.handlers: dict[str, Handler] = {}
        self.sent = self.received = 0
        self.packet = PACKET

    async def start(self) -> None:
        """Join the broker."""
        self.broker.clients.append(self)
        self.connected.set()
        for call in self.on_connect:
            call()

    async def stop(self) -> None:
        """Leave the broker."""
        self.connected.clear()
        if self in self.broker.clients:
            self.broker.clients.remove(self)

    async def subscribe(self, pattern: str, handler: Handler) -> None:
        """Retained messages come first."""
        self.handlers[pattern] = handler
        for topic, payload in list(self.broker.retained.items()):
            if matches(pattern, topic):
                asyncio.get_running_loop().call_soon(self.take, topic, payload)

    async def unsubscribe(self, pattern: str) -> None:
        """Forget the handler."""
        self.handlers.pop(pattern, None)

    async def publish(self, topic: str, payload: bytes, retain: bool = False, again: bool = True) -> bool:
        """Hand the message to the broker."""
        await self.connected.wait()
        self.sent += len(payload)
        self.broker.deliver(topic, payload, retain)
        return True

    def take(self, topic: str, payload: bytes) -> None:
        """Called by the broker."""
        if not self.connected.is_set():
            return
        for pattern, handler in list(self.handlers.items()):
            if matches(pattern, topic):
                self.received += len(payload)
                handler(topic, payload)
