"""Both programs as processes, over real brokers: a whole job, CLI included; broker restarts; a worker that
is killed."""

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from rankfleet.coordinator.broker.child import BrokerChild, mosquitto
from rankfleet.coordinator.config import Broker
from rankfleet.federated.errors import ConfigError
from rankfleet.federated.transport.address import parse_url
from rankfleet.federated.transport.mqtt import MqttBus

from .world import job, rows

KINDS = [
    "amqtt",
    pytest.param(
        "mosquitto", marks=pytest.mark.skipif(mosquitto() is None, reason="Mosquitto is not installed")
    ),
]


class Programs:
    """A coordinator and two agents, as users run them."""

    def __init__(self, home: Path, model: Path, kind: str) -> None:
        self.home, self.processes = home, []
        self.config = self.write(
            "coordinator.yaml",
            {
                "data_dir": str(home / "c"),
                "broker": {"kind": kind.removesuffix("+tls"), "port": 0, "tls": kind.endswith("+tls")},
                "https": {"port": 0},
                "models": {"tiny": str(model)},
                "limits": {"packet_bytes": 2000, "nudge_s": 2},
            },
        )
        self.agents = {}
        for i, name in enumerate(("d0", "d1")):
            (home / f"{name}.jsonl").write_text("\n".join(json.dumps(r) for r in rows(60, i)))
            self.agents[name] = self.write(
                f"{name}.yaml",
                {
                    "state_dir": str(home / name),
                    "profile": "laptop-x86-16gb",
                    "threads": 1,
                    "models": {"tiny": str(model)},
                    "datasets": {"words": {"path": str(home / f"{name}.jsonl")}},
                    "link": {"answer_s": 1},
                },
            )

    def write(self, name: str, data: Any) -> Path:
        (self.home / name).write_text(yaml.safe_dump(data))
        return self.home / name

    def start(self, *words: str) -> subprocess.Popen[bytes]:
        with (self.home / f"{words[0]}-{len(self.processes)}.log").open("wb") as log:
            self.processes.append(
                subprocess.Popen([sys.executable, "-W", "ignore", "-m", *words], stdout=log, stderr=log)
            )
        return self.processes[-1]

    def run(self, *words: str, code: int = 0) -> str:
        done = subprocess.run(
            [sys.executable, "-W", "ignore", "-m", *words], capture_output=True, text=True, check=False
        )
        assert done.returncode == code, done.stderr
        return done.stdout if code == 0 else done.stderr

    def coordinator(self, *words: str, code: int = 0) -> str:
        return self.run("rankfleet.coordinator", *words, "--config", str(self.config), code=code)

    def json(self, *words: str) -> Any:
        return json.loads(self.coordinator(*words, "--json"))

    def until(self, what: Any, seconds: float = 90) -> None:
        end = time.time() + seconds
        while not what():
            assert time.time() < end, "\n".join(p.read_text()[-1500:] for p in self.home.glob("*.log"))
            time.sleep(0.2)

    def begin(self) -> None:
        """Both agents are enrolled and run."""
        self.start("rankfleet.coordinator", "serve", "--config", str(self.config))
        self.until(lambda: (self.home / "c" / "api.json").exists())
        for name, config in self.agents.items():
            token = self.coordinator("invite", name).strip()
            self.run("rankfleet.edge_agent", "enroll", token, "--config", str(config))
            self.start("rankfleet.edge_agent", "run", "--config", str(config))
        self.until(lambda: all(d["state"] == "enrolled" for d in self.json("devices")))

    def stop(self) -> None:
        for p in self.processes:
            p.terminate()
        for p in self.processes:
            p.wait(20)


@pytest.fixture
def programs(request: pytest.FixtureRequest, tmp_path: Path, tiny: Path) -> Iterator[Programs]:
    made = Programs(tmp_path, tiny, request.param)
    try:
        made.begin()
        yield made
    finally:
        made.stop()


@pytest.mark.slow
@pytest.mark.parametrize("programs", KINDS, indirect=True)
def test_a_job_from_the_command_line(programs: Programs, tmp_path: Path) -> None:
    text = job(rounds=2, stack=["sparse"])
    (tmp_path / "job.yaml").write_text(text)
    (tmp_path / "bad.yaml").write_text(text + "rouns: 3\n")
    assert "unknown key `rouns`" in programs.coordinator("submit", str(tmp_path / "bad.yaml"), code=1)
    assert "the job is valid" in programs.coordinator("submit", str(tmp_path / "job.yaml"), "--dry-run")
    assert "queued as `toy-1`" in programs.coordinator("submit", str(tmp_path / "job.yaml"))
    programs.until(lambda: programs.json("jobs")[0]["state"] in ("finished", "failed"))
    assert programs.json("jobs")[0]["state"] == "finished", programs.json("jobs")
    assert "top(" in programs.coordinator("rounds", "toy-1")
    assert "fixed" in programs.coordinator("arms", "toy-1", "explain") or "largest" in programs.coordinator(
        "arms", "toy-1", "explain"
    )
    assert len(programs.json("versions", "list", "toy-1")) == 3
    programs.coordinator("versions", "rollback", "toy-1", "1")
    assert [v["state"] for v in programs.json("versions", "list", "toy-1")][-1] == "rolled back"
    programs.coordinator("versions", "promote", "toy-1", "2")
    programs.coordinator("export", "toy-1", "--to", str(tmp_path / "out"))
    assert (tmp_path / "out" / "adapter_model.safetensors").exists()
    programs.coordinator("export", "toy-1", "--to", str(tmp_path / "whole"), "--format", "merged")
    assert (tmp_path / "whole" / "model.safetensors").exists()
    shown = programs.coordinator(
        "watch", "toy-1", "--once", "--png", str(tmp_path / "job.png"), "--tensorboard", str(tmp_path / "tb")
    )
    assert "toy-1: finished, 3 rounds closed" in shown
    assert (tmp_path / "job.png").read_bytes().startswith(b"\x89PNG")
    assert list((tmp_path / "tb" / "toy-1").iterdir())
    assert "another coordinator runs with" in programs.coordinator("serve", code=1)
    assert "another edge-agent runs with" in programs.run(
        "rankfleet.edge_agent", "run", "--config", str(programs.agents["d0"]), code=1
    )
    assert "no job `nope`" in programs.coordinator("rounds", "nope", code=1)
    assert "is finished" in programs.coordinator("cancel", "toy-1", code=1)
    status = json.loads(
        programs.run("rankfleet.edge_agent", "status", "--config", str(programs.agents["d0"]), "--json")
    )
    assert status["running"]
    assert status["bytes_up"] > 0
    assert '"error"' not in programs.run(
        "rankfleet.edge_agent", "doctor", "--config", str(programs.agents["d0"]), "--json"
    )
    assert '"error"' not in programs.coordinator("doctor", "--json")
    programs.run("rankfleet.edge_agent", "leave", "--yes", "--config", str(programs.agents["d0"]))
    assert not list((tmp_path / "d0").iterdir())
    programs.until(lambda: programs.json("devices")[0]["state"] == "left")


@pytest.mark.slow
@pytest.mark.parametrize("programs", ["amqtt+tls"], indirect=True)
def test_mutual_tls_from_the_command_line(programs: Programs, tmp_path: Path) -> None:
    (tmp_path / "job.yaml").write_text(job(rounds=1, stack=["sparse"]))
    programs.coordinator("submit", str(tmp_path / "job.yaml"))
    programs.until(lambda: programs.json("jobs")[0]["state"] in ("finished", "failed"))
    assert programs.json("jobs")[0]["state"] == "finished", programs.json("jobs")
    assert "until 2" in programs.coordinator("devices")
    doctor = json.loads(
        programs.run("rankfleet.edge_agent", "doctor", "--config", str(programs.agents["d0"]), "--json")
    )
    assert next(f for f in doctor if f["check"] == "broker")["text"].endswith("is of this fleet")
    assert "which device, to revoke?" in programs.coordinator("devices", "revoke", code=1)
    assert "suspend: d1" in programs.coordinator("devices", "suspend", "d1")
    assert "resume: d1" in programs.coordinator("devices", "resume", "d1")
    assert "`d1` is not suspended" in programs.coordinator("devices", "resume", "d1", code=1)
    assert "revoked: d1" in programs.coordinator("devices", "revoke", "d1")
    programs.until(lambda: {d["device"]: d["state"] for d in programs.json("devices")}["d1"] == "revoked")

    def status(name: str) -> Any:
        config = str(programs.agents[name])
        return json.loads(programs.run("rankfleet.edge_agent", "status", "--config", config, "--json"))

    programs.until(lambda: status("d0")["connected"] and not status("d1")["connected"])
    qr = programs.coordinator("invite", "d1", "--qr")
    assert qr.count("\n") > 20
    assert "is enrolled as `d1`" in programs.run(
        "rankfleet.edge_agent", "enroll", qr.split()[0], "--config", str(programs.agents["d1"]), code=1
    )
    programs.run(
        "rankfleet.edge_agent",
        "enroll",
        qr.split()[0],
        "--again",
        "--no-probe",
        "--config",
        str(programs.agents["d1"]),
    )


@pytest.mark.slow
@pytest.mark.parametrize("programs", KINDS[-1:], indirect=True)
def test_broker_worker_and_agent_killed(programs: Programs, tmp_path: Path) -> None:
    (tmp_path / "job.yaml").write_text(
        job(rounds=4, arms={"ranks": [2], "bits": [32], "steps": [150], "batch": 8})
    )
    programs.coordinator("submit", str(tmp_path / "job.yaml"))
    coordinator, agent = psutil.Process(programs.processes[0].pid), psutil.Process(programs.processes[1].pid)
    programs.until(lambda: agent.children() and programs.json("rounds", "toy-1")["rounds"])
    programs.until(
        lambda: any(d["state"] == "training" for d in programs.json("rounds", "toy-1")["live"].values())
    )
    killed = agent.children()[0]
    killed.send_signal(signal.SIGKILL)
    programs.until(
        lambda: agent.children() and agent.children()[0].pid != killed.pid
    )  # once may have been chance
    agent.children()[0].send_signal(signal.SIGKILL)
    programs.until(
        lambda: any(
            d["state"] == "failed" for r in programs.json("rounds", "toy-1")["rounds"] for d in r["devices"]
        )
    )
    failed = [
        d for r in programs.json("rounds", "toy-1")["rounds"] for d in r["devices"] if d["state"] == "failed"
    ]
    assert "most likely for memory" in failed[0]["reason"]
    broker = next(
        c
        for c in coordinator.children()
        if "mosquitto" in " ".join(c.cmdline()) or "amqtt" in " ".join(c.cmdline())
    )
    broker.kill()
    programs.until(lambda: programs.json("jobs")[0]["state"] in ("finished", "failed"), seconds=180)
    assert programs.json("jobs")[0]["state"] == "finished"
    assert agent.is_running()


@pytest.mark.parametrize("kind", KINDS)
async def test_the_bus_speaks_to_real_brokers_and_outlives_them(tmp_path: Path, kind: str) -> None:
    child = BrokerChild(Broker(kind=kind, port=0), tmp_path)
    await child.start()
    a, b = MqttBus(child.url, "a"), MqttBus(child.url, "b")
    heard: asyncio.Queue[bytes] = asyncio.Queue()
    await b.subscribe("x/#", lambda topic, payload: heard.put_nowait(payload))
    await a.start()
    await b.start()
    try:
        await asyncio.wait_for(asyncio.gather(a.connected.wait(), b.connected.wait()), 30)
        await asyncio.sleep(0.3)
        await asyncio.wait_for(a.publish("x/1", b"one" * 30_000), 10)
        assert await asyncio.wait_for(heard.get(), 10) == b"one" * 30_000
        assert child.process is not None
        os.kill(child.process.pid, signal.SIGKILL)
        await asyncio.sleep(0.5)

        async def again() -> None:
            while heard.empty():
                await a.publish("x/2", b"two")
                await asyncio.sleep(0.5)

        await asyncio.wait_for(again(), 40)
        assert await heard.get() == b"two"
        assert a.sent >= 90_003
    finally:
        await a.stop()
        await b.stop()
        await child.stop()


async def test_a_client_that_starts_before_its_broker(tmp_path: Path) -> None:
    child = BrokerChild(Broker(port=0), tmp_path)
    bus = MqttBus(child.url, "early")
    await bus.start()
    await asyncio.sleep(0.5)
    assert not bus.connected.is_set()
    await child.start()
    try:
        await asyncio.wait_for(bus.connected.wait(), 30)
        await asyncio.wait_for(bus.publish("x", b"y"), 10)
    finally:
        await bus.stop()
        await child.stop()


async def test_a_port_in_use_is_said(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        child = BrokerChild(Broker(port=taken.getsockname()[1]), tmp_path)
        with pytest.raises(ConfigError, match="is the port in use"):
            await child.start()


@pytest.mark.parametrize("url", ["", "http://x", "mqtt://", "mqtt://h:99999", "h:1883"])
def test_bad_broker_addresses(url: str) -> None:
    with pytest.raises(ConfigError):
        parse_url(url)


def test_programs_start_in_a_blink() -> None:
    times = []
    for _ in range(5):
        start = time.perf_counter()
        subprocess.run(
            [sys.executable, "-m", "rankfleet.coordinator", "--help"], capture_output=True, check=True
        )
        times.append(time.perf_counter() - start)
    # The figure to reach is 0.3 s; a loaded machine must not fail a test, a heavy import must.
    assert min(times) < 1.0


@pytest.mark.skipif(mosquitto() is None, reason="Mosquitto is not installed")
async def test_the_broker_of_a_killed_coordinator_is_replaced(tmp_path: Path) -> None:
    first = BrokerChild(Broker(kind="mosquitto", port=0), tmp_path)
    await first.start()
    assert first._task
    assert first.process
    first._task.cancel()  # what a kill -9 leaves: a broker that nobody watches
    second = BrokerChild(Broker(kind="mosquitto", port=first.port), tmp_path)
    try:
        await second.start()
        assert second.process
        assert second.process.pid != first.process.pid
        assert second.restarts == 0
        assert await asyncio.wait_for(first.process.wait(), 5) != 0
    finally:
        await second.stop()
