"""The bus over MQTT: one file on paho-mqtt, its network thread, and `call_soon_threadsafe` into the loop.

MQTT 5 first, 3.1.1 where the broker refuses it or hangs up. The session is clean: what matters is retained, in an outbox or
asked for again, so nothing depends on what a broker remembers.
"""

import asyncio
import logging
import ssl
from collections.abc import Callable
from typing import Any
from urllib.parse import unquote, urlsplit

import msgspec
import paho.mqtt.client as paho
from paho.mqtt.enums import CallbackAPIVersion, MQTTProtocolVersion

from .bus import PACKET, Handler
from .errors import ConfigError
from .topics import matches

log = logging.getLogger(__name__)
PORTS = {"mqtt": 1883, "mqtts": 8883, "ws": 80, "wss": 443}


class BrokerURL(msgspec.Struct, frozen=True):
    """`mqtt[s]://[user:password@]host[:port]`, or `ws[s]://…/path`."""

    scheme: str
    host: str
    port: int
    user: str = ""
    password: str = ""
    path: str = "/mqtt"


def parse_url(url: str) -> BrokerURL:
    """Raises ConfigError for anything that is not a broker's address."""
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError as error:
        raise ConfigError(f"broker address {url!r}: {error}", "mqtt://host:1883") from None
    if parts.scheme not in PORTS or not parts.hostname:
        raise ConfigError(f"broker address {url!r} is not understood", "mqtt://host:1883, mqtts://, ws:// or wss://")
    return BrokerURL(
        parts.scheme,
        parts.hostname,
        port or PORTS[parts.scheme],
        unquote(parts.username or ""),
        unquote(parts.password or ""),
        parts.path or "/mqtt",
    )


class MqttBus:
    """A client of an MQTT broker. `keepalive_s` also bounds how late a dead link is noticed."""

    def __init__(self, url: str, client_id: str, *, keepalive_s: int = 60, tls: ssl.SSLContext | None = None, packet: int = PACKET) -> None:
        self.url, self.client_id, self.keepalive_s, self.tls, self.packet = parse_url(url), client_id, keepalive_s, tls, packet
        self.connected = asyncio.Event()
        self.on_connect: list[Callable[[], None]] = []
        self.sent = self.received = 0
        self.problem = ""
        self._handlers: dict[str, Handler] = {}
        self._waiting: dict[int, asyncio.Future[None]] = {}
        self._protocol = MQTTProtocolVersion.MQTTv5
        self._agreed = False
        self._client: paho.Client | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    async def start(self) -> None:
        """Connect in the background, for as long as it takes."""
        self._loop = asyncio.get_running_loop()
        self._open()

    def _open(self) -> None:
        client = paho.Client(
            CallbackAPIVersion.VERSION2,
            self.client_id,
            protocol=self._protocol,
            transport="websockets" if self.url.scheme.startswith("ws") else "tcp",
        )
        if self.url.user:
            client.username_pw_set(self.url.user, self.url.password)
        if self.url.scheme in ("mqtts", "wss"):
            client.tls_set_context(self.tls or ssl.create_default_context())
        if self.url.scheme.startswith("ws"):
            client.ws_set_options(self.url.path)
        client.max_inflight_messages_set(16)
        client.reconnect_delay_set(1, 30)
        client.on_connect = self._on_connect
        client.on_disconnect = self._on_disconnect
        client.on_message = lambda c, u, m: self._call(self._take, m.topic, bytes(m.payload))
        client.on_publish = lambda c, u, mid, code, p: self._call(self._done, mid)
        client.connect_async(self.url.host, self.url.port, self.keepalive_s)
        client.loop_start()
        self._client = client

    def _call(self, function: Callable[..., None], *args: Any) -> None:
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(function, *args)

    def _on_connect(self, client: paho.Client, user: Any, flags: Any, code: Any, properties: Any = None) -> None:
        if code.is_failure:
            self.problem = f"broker refuses the connection: {code}"
            if "protocol" in str(code).lower():
                self._call(self._other_protocol, client)
            return
        limit = getattr(properties, "MaximumPacketSize", None)
        for pattern in list(self._handlers):
            client.subscribe(pattern, qos=1)
        self._call(self._up, client, limit)

    def _up(self, client: paho.Client, limit: int | None) -> None:
        if client is not self._client:
            return
        self.packet = min(self.packet, limit) if limit else self.packet
        self._agreed, self.problem = True, ""
        self.connected.set()
        for call in self.on_connect:
            call()

    def _on_disconnect(self, client: paho.Client, user: Any, flags: Any, code: Any, properties: Any = None) -> None:
        self._call(self._down, client, str(code))

    def _down(self, client: paho.Client, reason: str) -> None:
        if client is not self._client:
            return
        self.connected.clear()
        self.problem = self.problem or f"connection to the broker lost: {reason}"
        if not self._agreed:
            self._other_protocol(client)

    def _other_protocol(self, client: paho.Client) -> None:
        """A broker that hangs up before it agreed may speak only the older version."""
        if client is not self._client or self._agreed:
            return
        old = self._protocol == MQTTProtocolVersion.MQTTv311
        self._protocol = MQTTProtocolVersion.MQTTv5 if old else MQTTProtocolVersion.MQTTv311
        self._client = None
        task = self._loop.create_task(self._reopen(client, 1.0 if old else 0.1), name="mqtt-reopen")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _reopen(self, client: paho.Client, wait_s: float) -> None:
        await asyncio.to_thread(self._shut, client)
        await asyncio.sleep(wait_s)
        self._open()

    @staticmethod
    def _shut(client: paho.Client) -> None:
        client.disconnect()
        client.loop_stop()

    def _take(self, topic: str, payload: bytes) -> None:
        self.received += len(payload)
        for pattern, handler in list(self._handlers.items()):
            if matches(pattern, topic):
                try:
                    handler(topic, payload)
                except Exception:
                    log.exception("a message on %s was dropped: its handler failed", topic)

    def _done(self, mid: int) -> None:
        future = self._waiting.pop(mid, None)
        if future and not future.done():
            future.set_result(None)

    async def subscribe(self, pattern: str, handler: Handler) -> None:
        """Now, and after every reconnect."""
        self._handlers[pattern] = handler
        if self._client and self.connected.is_set():
            self._client.subscribe(pattern, qos=1)

    async def unsubscribe(self, pattern: str) -> None:
        """Stop delivering `pattern`."""
        if self._handlers.pop(pattern, None) and self._client and self.connected.is_set():
            self._client.unsubscribe(pattern)

    async def publish(self, topic: str, payload: bytes, retain: bool = False) -> None:
        """QoS 1; returns after the broker's PUBACK, which proves nothing more than that a broker took it."""
        while True:
            await self.connected.wait()
            client = self._client
            if client is None:
                await asyncio.sleep(0.05)
                continue
            info = client.publish(topic, payload, qos=1, retain=retain)
            self.sent += len(payload)
            future = self._waiting.setdefault(info.mid, self._loop.create_future())
            while client is self._client and not future.done():
                await asyncio.wait([future], timeout=1.0)
                if not future.done() and info.is_published():
                    self._done(info.mid)
            if future.done():
                return
            self._waiting.pop(info.mid, None)

    async def stop(self) -> None:
        """Disconnect and end the network thread."""
        for task in list(self._tasks):
            task.cancel()
        self.connected.clear()
        client, self._client = self._client, None
        if client:
            await asyncio.to_thread(self._shut, client)
