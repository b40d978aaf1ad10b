"""Whole jobs over links and brokers as they are found: TLS and passwords, proxies, small packets, queues
that overflow, restarts."""

import asyncio
import base64
import contextlib
import os
import shutil
import signal
import ssl
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from paho.mqtt.enums import MQTTProtocolVersion

from benchmarks.slow_link import SlowLink
from rankfleet.coordinator.broker.child import free_port, mosquitto
from rankfleet.coordinator.exchange.https_server import make_certificate
from rankfleet.coordinator.store import tables
from rankfleet.federated.errors import ConfigError
from rankfleet.federated.transport.address import parse_proxy, tls_context, without_password
from rankfleet.federated.transport.memory import MemoryBroker
from rankfleet.federated.transport.mqtt import MqttBus

from .world import World, job

needs_mosquitto = pytest.mark.skipif(mosquitto() is None, reason="Mosquitto is not installed")


class Mosquitto:
    """A real broker with a configuration of ours."""

    def __init__(self, home: Path, *lines: str) -> None:
        self.port, self.home = free_port(), home
        home.mkdir(parents=True, exist_ok=True)
        (home / "m.conf").write_text(
            "\n".join([f"listener {self.port} 127.0.0.1", "log_type all", "user root", *lines]) + "\n"
        )
        self.process: subprocess.Popen[bytes] | None = None

    async def start(self) -> None:
        with (self.home / "m.log").open("ab") as log:
            self.process = subprocess.Popen(
                [str(mosquitto()), "-c", str(self.home / "m.conf")], stdout=log, stderr=log
            )
        for _ in range(100):
            with contextlib.suppress(OSError):
                _, writer = await asyncio.open_connection("127.0.0.1", self.port)
                writer.close()
                return
            await asyncio.sleep(0.05)
        raise AssertionError((self.home / "m.log").read_text())

    def stop(self, how: int = signal.SIGTERM) -> None:
        if self.process:
            self.process.send_signal(how)
            self.process.wait(10)

    async def __aenter__(self) -> "Mosquitto":
        await self.start()
        return self

    async def __aexit__(self, *error: object) -> None:
        self.stop()


class OverMqtt(World):
    """The small world, connected by real MQTT clients to a real broker."""

    def __init__(
        self, home: Path, model: Path, url: str, protocol: MQTTProtocolVersion | None = None, **options: Any
    ) -> None:
        self.options = {k: options.pop(k) for k in ("tls", "proxy", "threaded") if k in options}
        super().__init__(home, model, **options)
        self.url, self.protocol = url, protocol
        self.buses: list[MqttBus] = []

    def bus(self, name: str) -> Any:
        made = MqttBus(self.url, name, packet=self.packet, **self.options)
        made.protocol = self.protocol or made.protocol
        self.buses.append(made)
        return made

    def counted(self, name: str) -> list[str]:
        return [r["state"] for r in self.coordinator.ledger.rows(tables.assignments, job=name)]


async def connected(bus: MqttBus, seconds: float = 20) -> bool:
    await bus.start()
    for _ in range(int(seconds * 20)):
        if bus.connected.is_set():
            return True
        if "refuses" in bus.problem or "verify failed" in bus.problem:
            return False
        await asyncio.sleep(0.05)
    return False


@needs_mosquitto
@pytest.mark.filterwarnings(
    "ignore::pytest.PytestUnraisableExceptionWarning"
)  # paho leaves a socket whose handshake failed to the collector
@pytest.mark.parametrize("protocol", [MQTTProtocolVersion.MQTTv5, MQTTProtocolVersion.MQTTv311])
async def test_tls_with_user_and_password(tmp_path: Path, tiny: Path, protocol: MQTTProtocolVersion) -> None:
    cert, key = tmp_path / "b.crt", tmp_path / "b.key"
    make_certificate(cert, key, "localhost")
    subprocess.run(["mosquitto_passwd", "-b", "-c", str(tmp_path / "users"), "fleet", "s3cr:t@"], check=True)
    lines = [
        f"certfile {cert}",
        f"keyfile {key}",
        f"password_file {tmp_path / 'users'}",
        "allow_anonymous false",
    ]
    tls = tls_context(str(cert))
    async with Mosquitto(tmp_path / "m", *lines) as broker:
        url = f"mqtts://fleet:s3cr%3At%40@localhost:{broker.port}"
        async with OverMqtt(tmp_path / "w", tiny, url, protocol, tls=tls, devices=2) as world:
            assert world.counted(await world.run(job(rounds=2, stack=["sparse"])))[:4] == ["counted"] * 4
            assert {b.protocol for b in world.buses} == {protocol}
        wrong = MqttBus(f"mqtts://fleet:wrong@localhost:{broker.port}", "x", tls=tls)
        assert not await connected(wrong)
        assert "refuses the connection: Not authorized" in wrong.problem
        await wrong.stop()
        stranger = MqttBus(url, "x", tls=ssl.create_default_context())
        assert not await connected(stranger)
        assert "certificate verify failed" in stranger.problem
        await stranger.stop()


@needs_mosquitto
async def test_a_broker_that_refuses_is_not_hammered(tmp_path: Path) -> None:
    async with Mosquitto(tmp_path / "m", "allow_anonymous false") as broker:
        bus = MqttBus(f"mqtt://127.0.0.1:{broker.port}", "x")
        await bus.start()
        await asyncio.sleep(4)
        await bus.stop()
    tries = (tmp_path / "m" / "m.log").read_text().count("New connection from") - 1
    assert 2 <= tries <= 8


class Proxy:
    """An HTTP proxy that knows CONNECT and one user."""

    def __init__(self, user: str, password: str) -> None:
        self.want = base64.b64encode(f"{user}:{password}".encode()).decode()
        self.seen: list[str] = []
        self._tasks: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> "Proxy":
        self.server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.port = self.server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *error: object) -> None:
        self.server.close()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        fields = {
            k.lower(): v for k, v in (line.split(": ", 1) for line in head.split("\r\n")[1:] if ": " in line)
        }
        self.seen.append(head.split("\r\n")[0])
        if fields.get("proxy-authorization", "").split(" ")[-1] != self.want:
            writer.write(b"HTTP/1.1 407 Proxy Authentication Required\r\n\r\n")
            writer.close()
            return
        host, port = head.split()[1].rsplit(":", 1)
        there, back = await asyncio.open_connection(host, int(port))
        writer.write(b"HTTP/1.1 200 Connection established\r\n\r\n")
        for a, b in ((reader, back), (there, writer)):
            task = asyncio.create_task(self._pump(a, b))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while block := await reader.read(65536):
                writer.write(block)
                await writer.drain()
        writer.close()


@contextlib.asynccontextmanager
async def websocket_broker(home: Path) -> AsyncIterator[tuple[int, ssl.SSLContext]]:
    """amqtt with a WebSocket listener under TLS, as a process; Debian's Mosquitto is built without
    WebSockets."""
    cert, key, port = home / "ws.crt", home / "ws.key", free_port()
    make_certificate(cert, key, "localhost")
    program = f"""
import asyncio, logging
from amqtt.broker import Broker
logging.disable(logging.CRITICAL)
async def serve():
    broker = Broker({{
        "listeners": {{"default": {{"type": "ws", "bind": "localhost:{port}", "ssl": True,
                                  "certfile": "{cert}", "keyfile": "{key}"}}}},
        "plugins": {{"amqtt.plugins.authentication.AnonymousAuthPlugin": {{"allow_anonymous": True}}}},
    }})
    await broker.start()
    await asyncio.Event().wait()
asyncio.run(serve())
"""
    process = subprocess.Popen([sys.executable, "-W", "ignore", "-c", program], stderr=subprocess.DEVNULL)
    try:
        for _ in range(200):
            await asyncio.sleep(0.05)
            with contextlib.suppress(OSError):
                _, writer = await asyncio.open_connection("localhost", port)
                writer.close()
                break
        yield port, tls_context(str(cert))
    finally:
        process.terminate()
        process.wait(10)


async def test_websocket_through_a_proxy_with_user_and_password(tmp_path: Path, tiny: Path) -> None:
    pytest.importorskip("socks")
    async with websocket_broker(tmp_path) as (port, tls), Proxy("joe", "pa ss") as proxy:
        url, through = f"wss://localhost:{port}/mqtt", f"http://joe:pa%20ss@127.0.0.1:{proxy.port}"
        async with OverMqtt(
            tmp_path / "w", tiny, url, tls=tls, proxy=through, devices=2, packet=20_000
        ) as world:
            assert world.counted(await world.run(job(rounds=2, stack=["sparse"]), 60))[:4] == ["counted"] * 4
        assert set(proxy.seen) == {f"CONNECT localhost:{port} HTTP/1.1"}
        wrong = MqttBus(url, "x", tls=tls, proxy=f"http://joe:no@127.0.0.1:{proxy.port}")
        await wrong.start()
        for _ in range(200):
            if wrong.problem:
                break
            await asyncio.sleep(0.05)
        assert "407" in wrong.problem
        await wrong.stop()


@needs_mosquitto
async def test_a_broker_that_caps_packets(tmp_path: Path, tiny: Path) -> None:
    """MQTT 5 tells the cap at once; what is larger would end the connection."""
    async with (
        Mosquitto(tmp_path / "m", "allow_anonymous true", "max_packet_size 8000") as broker,
        OverMqtt(tmp_path / "w", tiny, f"mqtt://127.0.0.1:{broker.port}", devices=2, packet=120_000) as world,
    ):
        assert world.counted(await world.run(job(rounds=2)))[:4] == ["counted"] * 4
        assert {b.packet for b in world.buses} == {8000 - 256}
        assert world.coordinator.uploads.corrupt == 0


@needs_mosquitto
async def test_a_cap_of_128_kb_is_kept_by_default(tmp_path: Path) -> None:
    """3.1.1 does not tell; our packets are smaller than the smallest cap that brokers are known to have."""
    from rankfleet.federated.transport.bus import PACKET
    from rankfleet.federated.wire.transfer import blob_of, cut

    async with Mosquitto(tmp_path / "m", "allow_anonymous true", "max_packet_size 131072") as broker:
        url = f"mqtt://127.0.0.1:{broker.port}"
        a, b = MqttBus(url, "a"), MqttBus(url, "b")
        a.protocol = b.protocol = MQTTProtocolVersion.MQTTv311
        heard: asyncio.Queue[bytes] = asyncio.Queue()
        await b.subscribe("x", lambda topic, payload: heard.put_nowait(payload))
        assert await connected(a)
        assert await connected(b)
        data = bytes(500_000)
        blob = blob_of(data, PACKET)
        for n in range(blob.chunks):
            await asyncio.wait_for(a.publish("x", cut(data, blob, n)), 10)
            assert len(await asyncio.wait_for(heard.get(), 10)) <= 120_000
        await a.stop()
        await b.stop()


async def test_a_broker_that_accepts_and_drops_is_named(tmp_path: Path, tiny: Path) -> None:
    class Forgetful(MemoryBroker):
        def deliver(self, topic: str, payload: bytes, retain: bool) -> None:
            if not topic.endswith("/chunk"):
                super().deliver(topic, payload, retain)

    async with World(tmp_path, tiny, devices=2, broker=Forgetful()) as world:
        world.coordinator.jobs.submit(job(rounds=1))
        agent, _ = world.agents["d0"]
        await world.until(lambda: "accepts but does not deliver" in str(agent.status.get("last_error")), 30)


@needs_mosquitto
async def test_queues_that_overflow_lose_nothing(tmp_path: Path, tiny: Path) -> None:
    """Mosquitto drops without a word what does not fit into a client's queue: what is missing is asked for
    again."""
    lines = ["allow_anonymous true", "max_queued_messages 2", "max_inflight_messages 1"]
    async with (
        Mosquitto(tmp_path / "m", *lines) as broker,
        OverMqtt(tmp_path / "w", tiny, f"mqtt://127.0.0.1:{broker.port}", devices=3, packet=400) as world,
    ):
        name = await world.run(job(rounds=2), 90)
        assert world.counted(name)[:6] == ["counted"] * 6
    assert "Outgoing messages are being dropped" in (tmp_path / "m" / "m.log").read_text()


@needs_mosquitto
@pytest.mark.parametrize("persistence", [True, False])
async def test_a_broker_that_restarts(tmp_path: Path, tiny: Path, persistence: bool) -> None:
    store_ = f"persistence true\npersistence_location {tmp_path}/" if persistence else "persistence false"
    broker = Mosquitto(tmp_path / "m", "allow_anonymous true", store_)
    await broker.start()
    try:
        async with OverMqtt(tmp_path / "w", tiny, f"mqtt://127.0.0.1:{broker.port}", devices=2) as world:
            name = world.coordinator.jobs.submit(job(rounds=4, stack=["sparse"]))
            for number, how in ((1, signal.SIGKILL), (2, signal.SIGTERM)):
                await world.until(
                    lambda n=number: len(world.coordinator.ledger.rows(tables.versions, job=name)) > n
                )  # type: ignore[misc]
                broker.stop(how)
                await asyncio.sleep(0.3)
                await broker.start()
            await world.until(lambda: world.job_state(name) == "finished", 90)
            assert world.counted(name)[:8] == ["counted"] * 8
    finally:
        broker.stop()


@needs_mosquitto
async def test_paho_may_bring_its_own_thread(tmp_path: Path, tiny: Path) -> None:
    """What loops that cannot watch sockets use, such as Windows' default one."""
    async with (
        Mosquitto(tmp_path / "m", "allow_anonymous true") as broker,
        OverMqtt(tmp_path / "w", tiny, f"mqtt://127.0.0.1:{broker.port}", devices=2, threaded=True) as world,
    ):
        assert world.counted(await world.run(job(rounds=2)))[:4] == ["counted"] * 4


@needs_mosquitto
async def test_a_slow_link_that_stalls_and_is_cut(tmp_path: Path, tiny: Path) -> None:
    """The device is behind a relay: nothing can reach it from outside."""
    async with Mosquitto(tmp_path / "m", "allow_anonymous true") as broker:
        target = ("127.0.0.1", broker.port)
        async with SlowLink(target, rate=400_000, delay=0.1, stall_every=3, stall=0.5, cut_every=2) as link:

            class Far(OverMqtt):
                def bus(self, name: str) -> Any:
                    self.url = f"mqtt://127.0.0.1:{link.port if name == 'd0' else broker.port}"
                    return super().bus(name)

            async with Far(tmp_path / "w", tiny, "", devices=2, packet=2000) as world:
                assert world.counted(await world.run(job(rounds=5), 120))[:10] == ["counted"] * 10
                assert link.cuts >= 1
                # It comes back after every cut, the last one too, which may have come this very moment.
                await world.until(lambda: link.connections > link.cuts, 20)


@pytest.mark.parametrize("url", ["socks9://x:1", "http://host", "nonsense"])
def test_bad_proxies(url: str) -> None:
    pytest.importorskip("socks")
    with pytest.raises(ConfigError, match="is not understood"):
        parse_proxy(url)


def test_bad_tls_files(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="TLS files"):
        tls_context(str(tmp_path / "none.pem"))


def test_passwords_are_not_shown() -> None:
    assert without_password("mqtts://joe:secret@host:8883") == "mqtts://joe@host:8883"
    assert without_password("mqtt://host") == "mqtt://host"


@pytest.fixture
def far_away() -> Iterator[tuple[list[str], str]]:
    """A network namespace behind a link of 2 Mbit/s: (how to run something there, this side's address).
    Skips where none can be had."""
    name, net = f"rf{os.getpid()}", f"10.{os.getpid() % 200 + 20}.7"
    here, there = f"{net}.1", f"{net}.2"
    steps = [
        f"ip netns add {name}", f"ip link add {name}h type veth peer name "
                                f"{name}n", f"ip link set {name}n netns {name}",
        f"ip addr add {here}/24 dev {name}h", f"ip link set {name}h up", f"ip netns exec {name} ip addr add "
                                                                         f"{there}/24 dev {name}n",
        f"ip netns exec {name} ip link set {name}n up", f"ip netns exec {name} ip link set lo up",
        f"tc qdisc add dev {name}h root tbf rate 2mbit burst 32kbit latency 400ms",
        f"ip netns exec {name} tc qdisc add dev {name}n root tbf rate 2mbit burst 32kbit latency 400ms",
    ]  # fmt: skip
    try:
        for step in steps:
            done = subprocess.run(step.split(), capture_output=True, text=True, check=False)
            if done.returncode:
                pytest.skip(f"no network namespaces here: {step}: {done.stderr.strip()}")
        yield ["ip", "netns", "exec", name], here
    except FileNotFoundError as error:
        pytest.skip(f"no network namespaces here: {error}")
    finally:
        if shutil.which("ip"):
            subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)
            subprocess.run(["ip", "link", "del", f"{name}h"], capture_output=True, check=False)


@needs_mosquitto
async def test_an_agent_in_a_network_of_its_own(
    tmp_path: Path, tiny: Path, far_away: tuple[list[str], str]
) -> None:
    """A real agent process that only it can call out from: its network has one narrow link and no way in
    for the coordinator."""
    run_there, here = far_away
    async with Mosquitto(
        tmp_path / "m", "allow_anonymous true", f"listener {(port := free_port())} {here}"
    ) as broker:
        world = OverMqtt(tmp_path / "w", tiny, f"mqtt://127.0.0.1:{broker.port}", devices=2, packet=20_000)
        async with world:
            await world.kill_agent("d1")
            agent = {
                "state_dir": str(tmp_path / "w" / "d1"), "profile": "laptop-x86-16gb", "threads": 1,
                "models": {"tiny": str(tiny)},
                "datasets": {"words": {"path": str(world.data["d1"])}},
                "link": {"broker": f"mqtt://{here}:{port}", "answer_s": 2},
            }  # fmt: skip
            (tmp_path / "d1.yaml").write_text(yaml.safe_dump(agent))
            command = [
                *run_there,
                sys.executable,
                "-W",
                "ignore",
                "-m",
                "rankfleet.edge_agent",
                "run",
                "--config",
                str(tmp_path / "d1.yaml"),
            ]
            process = subprocess.Popen(command, cwd=Path(__file__).parent.parent)
            try:
                name = await world.run(job(rounds=2, stack=["sparse"]), 120)
                assert world.counted(name)[:4] == ["counted"] * 4
            finally:
                process.terminate()
                process.wait(20)
