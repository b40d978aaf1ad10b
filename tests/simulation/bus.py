"""A broker between simulated nodes that loses, doubles, delays, reorders and tears, forgets what was
retained, and hangs up."""

import asyncio
import contextvars
import random
from collections.abc import Callable

from rankfleet.federated.transport.bus import PACKET, Handler
from rankfleet.federated.transport.topics import matches


class Broker:
    """`wild` is the probability that something happens to a message; `tampered` counts what did."""

    def __init__(self, loop: asyncio.AbstractEventLoop, rng: random.Random) -> None:
        self.loop, self.rng = loop, rng
        self.up, self.life, self.wild = True, 0, 0.0
        self.retained: dict[str, bytes] = {}
        self.clients: list[SimulatedBus] = []
        self.tampered = 0
        self.heard: list[tuple[str, bytes]] = []

    def deliver(self, topic: str, payload: bytes, retain: bool) -> None:
        """To everybody who subscribed, sooner or later, perhaps not once."""
        if not self.up:
            return
        if retain:
            self.retained.pop(topic, None)
            if payload:
                self.retained[topic] = payload
        if len(self.heard) < 4000 and topic.endswith(("/job", "/up", "/down")):
            self.heard.append((topic, payload))
        times, extra = 1, 0.0
        if self.rng.random() < self.wild:
            self.tampered += 1
            fate = self.rng.randrange(4)
            times = 0 if fate == 0 else 2 if fate == 1 else 1
            extra = self.rng.uniform(0.0, 8.0) if fate == 2 else 0.0
            if fate == 3 and payload:
                at = self.rng.randrange(len(payload))
                payload = (
                    payload[:at]
                    if self.rng.random() < 0.5
                    else payload[:at] + bytes([payload[at] ^ 1]) + payload[at + 1 :]
                )
        for client in list(self.clients):
            for _ in range(times):
                self._hand(client, topic, payload, extra)

    def _hand(self, client: "SimulatedBus", topic: str, payload: bytes, extra: float) -> None:
        life = self.life

        def arrive() -> None:
            if self.life == life and self.loop.time() >= client.deaf_until:
                client.take(topic, payload)

        self.loop.call_later(self.rng.uniform(0.001, 0.03) + extra, arrive, context=client.context)

    def restart(self, seconds: float, keeps: bool) -> None:
        """Down for so long; what was under way is lost, and what was retained unless it `keeps` that."""
        self.up, self.life = False, self.life + 1
        if not keeps:
            self.retained.clear()
        for client in list(self.clients):
            client.cut()
        self.loop.call_later(seconds, self._back)

    def _back(self) -> None:
        self.up = True


class SimulatedBus:
    """One node's connection, made within the node's life."""

    def __init__(self, broker: Broker) -> None:
        self.broker, self.connected = broker, asyncio.Event()
        self.context = contextvars.copy_context()
        self.on_connect: list[Callable[[], None]] = []
        self.handlers: dict[str, Handler] = {}
        self.sent = self.received = 0
        self.packet = PACKET
        self.deaf_until = 0.0

    async def start(self) -> None:
        self.broker.clients.append(self)
        self._soon()

    async def stop(self) -> None:
        self.gone()

    def gone(self) -> None:
        """The node was killed."""
        if self in self.broker.clients:
            self.broker.clients.remove(self)

    def cut(self) -> None:
        """The connection ends; it is made again after a while."""
        self.connected.clear()
        self._soon()

    def _soon(self) -> None:
        self.broker.loop.call_later(self.broker.rng.uniform(0.05, 1.0), self._connect, context=self.context)

    def _connect(self) -> None:
        if self.connected.is_set() or self not in self.broker.clients:
            return
        if not self.broker.up:
            self._soon()
            return
        self.connected.set()
        for call in self.on_connect:
            call()
        for topic, payload in list(self.broker.retained.items()):
            if any(matches(p, topic) for p in self.handlers):
                self.broker._hand(self, topic, payload, 0.0)

    async def subscribe(self, pattern: str, handler: Handler) -> None:
        self.handlers[pattern] = handler
        if self.connected.is_set():
            for topic, payload in list(self.broker.retained.items()):
                if matches(pattern, topic):
                    self.broker._hand(self, topic, payload, 0.0)

    async def unsubscribe(self, pattern: str) -> None:
        self.handlers.pop(pattern, None)

    async def publish(self, topic: str, payload: bytes, retain: bool = False, again: bool = True) -> bool:
        if not again and not self.connected.is_set():
            return False
        await self.connected.wait()
        self.sent += len(payload)
        self.broker.deliver(topic, payload, retain)
        return True

    def take(self, topic: str, payload: bytes) -> None:
        if self.connected.is_set():
            for pattern, handler in list(self.handlers.items()):
                if matches(pattern, topic):
                    self.received += len(payload)
                    handler(topic, payload)
