"""The bus over MQTT: one file on paho-mqtt, driven by the event loop itself; by paho's thread where the
loop cannot watch sockets.

MQTT 5 first, 3.1.1 where the broker refuses it or hangs up. Every connection is a new, clean session: what
matters is retained, in an outbox or asked for again, so nothing depends on what a broker, or paho,
remembers. WebSocket, TLS and HTTP or SOCKS proxies are paho's own.
"""

import asyncio
import contextlib
import logging
import random
import ssl
import threading
from collections.abc import Callable
from typing import Any

import paho.mqtt.client as paho
from paho.mqtt.enums import CallbackAPIVersion, MQTTProtocolVersion

from ..program.within import within
from .address import parse_proxy, parse_url
from .bus import PACKET, Handler
from .topics import matches

log = logging.getLogger(__name__)
CONNECT_S = 20.0
AGREE_S = 20.0
"""How long a broker may take over CONNACK."""
IN_FLIGHT = 16
HEADER, MIN_PACKET = 256, 256
"""A broker's cap is on the whole packet: topic and properties are counted in."""
LONGEST_PAUSE_S = 30.0
ACK_S = 120.0
"""A PUBACK that is so late never comes: some brokers drop a packet without a word."""


class MqttBus:
    """A client of an MQTT broker. `keepalive_s` also bounds how late a dead link is noticed."""

    def __init__(
        self,
        url: str,
        client_id: str,
        *,
        keepalive_s: int = 60,
        tls: ssl.SSLContext | None = None,
        packet: int = PACKET,
        proxy: str = "",
        threaded: bool | None = None,
    ) -> None:
        self.url, self.client_id, self.keepalive_s, self.tls, self.packet = (
            parse_url(url),
            client_id,
            keepalive_s,
            tls,
            packet,
        )
        self.proxy = parse_proxy(proxy) if proxy else None
        self.connected = asyncio.Event()
        self.on_connect: list[Callable[[], None]] = []
        self.sent = self.received = 0
        self.problem = ""
        self.protocol = MQTTProtocolVersion.MQTTv5
        self._threaded = threaded
        self._handlers: dict[str, Handler] = {}
        self._waiting: dict[int, tuple[asyncio.Future[bool], float]] = {}
        self._agreed = False
        self._client: paho.Client | None = None
        self._watched: Any = None
        self._writing = False
        self._lost = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Connect in the background, for as long as it takes."""
        self._loop, self._ident = asyncio.get_running_loop(), threading.get_ident()
        if self._threaded is None:
            self._threaded = (
                not hasattr(asyncio, "SelectorEventLoop") or "Proactor" in type(self._loop).__name__
            )
        self._task = asyncio.create_task(self._keep_connected(), name="mqtt")

    async def stop(self) -> None:
        """Say goodbye and close."""
        client = self._client
        if client is not None and self.connected.is_set():
            client.disconnect()
            if not self._threaded:
                client.loop_write()
        if self._task:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        await self._close()

    async def _keep_connected(self) -> None:
        """One connection after the other, with a pause that grows while none succeeds."""
        failed = 0
        while True:
            self._lost.clear()
            try:
                await self._connect()
                # A broker that takes the connection and refuses us has failed like one that is not there.
                failed = 0 if await self._serve() else failed + 1
            except Exception as error:
                failed += 1
                self.problem = f"no connection to the broker at {self.url.host}:{self.url.port}: {error}"
            finally:
                await self._close()
            if self._agreed:
                await asyncio.sleep(random.uniform(0.5, 1.5) * min(LONGEST_PAUSE_S, 2.0**failed * 0.5))
            else:
                self._other_protocol()
                await asyncio.sleep(min(LONGEST_PAUSE_S, 0.1 + failed**2 * 0.1))

    def _other_protocol(self) -> None:
        """A broker that hangs up before it agreed may speak only the older version."""
        v5, v3 = MQTTProtocolVersion.MQTTv5, MQTTProtocolVersion.MQTTv311
        self.protocol = v5 if self.protocol == v3 else v3

    async def _connect(self) -> None:
        self._client = client = self._made()
        await asyncio.to_thread(client.connect, self.url.host, self.url.port, self.keepalive_s)
        if self._threaded:
            client.loop_start()
            return
        self._watched = client.socket()
        self._loop.add_reader(self._watched, self._read, client)
        self._write(client)

    async def _serve(self) -> bool:
        """Until the connection is lost: was it ever up? Raises OSError where a broker takes it and then
        says nothing."""
        client, since, up = self._client, self._loop.time(), False
        while not self._lost.is_set() and client is not None:
            if not self._threaded:
                client.loop_misc()
            if not self.connected.is_set() and self._loop.time() - since > AGREE_S:
                raise OSError("it takes the connection and does not answer")
            self._give_up_on(self._loop.time() - ACK_S)
            with contextlib.suppress(asyncio.TimeoutError):
                await within(1.0, self._lost.wait())
            up = up or self.connected.is_set()
        return up

    def _give_up_on(self, before: float) -> None:
        """A PUBACK that old never comes; the message is published again."""
        for mid in [m for m, (_, at) in self._waiting.items() if at < before]:
            future, _ = self._waiting.pop(mid)
            if not future.done():
                future.set_result(False)

    def _made(self) -> paho.Client:
        client = paho.Client(
            CallbackAPIVersion.VERSION2,
            self.client_id,
            protocol=self.protocol,
            transport="websockets" if self.url.scheme.startswith("ws") else "tcp",
            reconnect_on_failure=False,
        )
        if self.url.user:
            client.username_pw_set(self.url.user, self.url.password)
        if self.url.scheme in ("mqtts", "wss"):
            client.tls_set_context(self.tls or ssl.create_default_context())
        if self.url.scheme.startswith("ws"):
            client.ws_set_options(self.url.path)
        if self.proxy:
            client.proxy_set(**self.proxy)
        client.connect_timeout = CONNECT_S
        client.max_inflight_messages_set(IN_FLIGHT)
        client.on_connect = self._on_connect
        client.on_disconnect = lambda c, u, f, code, p: self._call(self._down, c, str(code))
        client.on_message = lambda c, u, m: self._call(self._take, m.topic, m.payload)
        client.on_publish = lambda c, u, mid, code, p: self._call(self._done, c, mid)
        if not self._threaded:
            client.on_socket_register_write = lambda c, u, s: self._call(self._write, c)
            client.on_socket_close = lambda c, u, s: self._unwatch()
        return client

    def _call(self, function: Callable[..., None], *args: Any) -> None:
        """From wherever paho calls: `connect` runs beside the loop, everything else in it unless paho has
        a thread."""
        if self._loop.is_closed():
            return
        if threading.get_ident() != self._ident:
            self._loop.call_soon_threadsafe(function, *args)
        elif function == self._write:
            self._loop.call_soon(function, *args)
        else:
            function(*args)

    def _read(self, client: paho.Client) -> None:
        client.loop_read()
        while (
            client is self._client
            and (sock := client.socket()) is not None
            and getattr(sock, "pending", int)() > 0
        ):
            client.loop_read()

    def _write(self, client: paho.Client) -> None:
        """Write what is queued; the loop says when the rest can go."""
        if client is not self._client or client.socket() is None:
            return
        client.loop_write()
        if self._watched is None or client is not self._client:
            return
        more = client.want_write()
        if more and not self._writing:
            self._loop.add_writer(self._watched, self._write, client)
        elif self._writing and not more:
            self._loop.remove_writer(self._watched)
        self._writing = more

    def _unwatch(self) -> None:
        if self._watched is not None:
            self._loop.remove_reader(self._watched)
            self._loop.remove_writer(self._watched)
        self._watched, self._writing = None, False

    def _on_connect(
        self, client: paho.Client, user: Any, flags: Any, code: Any, properties: Any = None
    ) -> None:
        if code.is_failure:
            self.problem = f"the broker refuses the connection: {code}"
            log.error("%s", self.problem)
            self._call(self._lost.set)
            return
        for pattern in list(self._handlers):
            client.subscribe(pattern, qos=1)
        self._call(self._up, client, getattr(properties, "MaximumPacketSize", None))

    def _up(self, client: paho.Client, limit: int | None) -> None:
        if client is not self._client:
            return
        self.packet = min(self.packet, max(MIN_PACKET, limit - HEADER)) if limit else self.packet
        self._agreed, self.problem = True, ""
        self.connected.set()
        for call in self.on_connect:
            call()

    def _down(self, client: paho.Client, reason: str) -> None:
        if client is self._client:
            self.problem = self.problem or f"connection to the broker lost: {reason}"
            self._lost.set()

    async def _close(self) -> None:
        """Forget the connection; whoever waits for a PUBACK publishes again on the next one."""
        self.connected.clear()
        client, self._client = self._client, None
        self._unwatch()
        if client is not None:
            if self._threaded:
                await asyncio.to_thread(client.loop_stop)
            if (sock := client.socket()) is not None:
                sock.close()
        waiting, self._waiting = self._waiting, {}
        for future, _ in waiting.values():
            if not future.done():
                future.set_result(False)

    def _take(self, topic: str, payload: bytes) -> None:
        self.received += len(payload)
        for pattern, handler in list(self._handlers.items()):
            if matches(pattern, topic):
                try:
                    handler(topic, payload)
                except Exception:
                    log.exception("a message on %s was dropped: its handler failed", topic)

    def _done(self, client: paho.Client, mid: int) -> None:
        future, _ = self._waiting.pop(mid, (None, 0.0)) if client is self._client else (None, 0.0)
        if future and not future.done():
            future.set_result(True)

    async def subscribe(self, pattern: str, handler: Handler) -> None:
        """Now, and after every reconnect."""
        self._handlers[pattern] = handler
        if self._client and self.connected.is_set():
            self._client.subscribe(pattern, qos=1)

    async def unsubscribe(self, pattern: str) -> None:
        """Stop delivering `pattern`."""
        if self._handlers.pop(pattern, None) and self._client and self.connected.is_set():
            self._client.unsubscribe(pattern)

    async def publish(self, topic: str, payload: bytes, retain: bool = False, again: bool = True) -> bool:
        """QoS 1; returns after the broker's PUBACK, which proves nothing more than that a broker took it.

        When the connection is lost before, the message is published once more; without `again` the answer
        is False.
        """
        while True:
            await self.connected.wait()
            client = self._client
            if client is None:
                await asyncio.sleep(0)
                continue
            info = client.publish(topic, payload, qos=1, retain=retain)
            self.sent += len(payload)
            future: asyncio.Future[bool] = self._loop.create_future()
            self._waiting[info.mid] = (future, self._loop.time())
            if await future:
                return True
            if not again:
                return False
