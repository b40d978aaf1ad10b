"""Starts and stops the demo's programs: one coordinator with its broker, one agent per device, each a real
process."""

import contextlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec
import psutil
import yaml

from rankfleet.coordinator.verbs.client import Client
from rankfleet.federated.program.loader import load


class DeviceEntry(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One emulated device."""

    name: str
    profile: str
    model_budget_mb: float
    threads: int
    up_kbps: float
    share: float


class FleetFile(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`fleet.yaml`."""

    devices: list[DeviceEntry]
    packet_bytes: int


class Fleet:
    """All processes of the demo, under one folder."""

    def __init__(self, file: Path, home: Path, model: Path, broker: str = "auto") -> None:
        self.spec = load(file, FleetFile)
        self.home, self.model, self.broker = home, model, broker
        self.coordinator: subprocess.Popen[bytes] | None = None
        self.agents: dict[str, subprocess.Popen[bytes]] = {}

    def write(self, path: Path, data: dict[str, Any]) -> Path:
        """A YAML file."""
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(yaml.safe_dump(data, sort_keys=False))
        return path

    def run(self, *words: str) -> str:
        """One command of ours, to its end; its standard output."""
        done = subprocess.run([sys.executable, "-m", *words], capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"{' '.join(words)}: {done.stderr}")
        return done.stdout.strip()

    def start(self, name: str, *words: str) -> subprocess.Popen[bytes]:
        """A service in the background, logging into the home folder."""
        with (self.home / f"{name}.log").open("ab") as log:
            return subprocess.Popen(
                [sys.executable, "-m", *words], stdout=log, stderr=log, start_new_session=True
            )

    def serve(self) -> Client:
        """Start the coordinator and wait until it answers."""
        self.config = self.write(
            self.home / "coordinator.yaml",
            {
                "data_dir": str(self.home / "coordinator"),
                "fleet": "demo",
                "broker": {"port": 0, "kind": self.broker},
                "models": {self.model_name: str(self.model)},
                "limits": {"packet_bytes": self.spec.packet_bytes},
            },
        )
        api = self.home / "coordinator" / "api.json"
        self.coordinator = self.start(
            "coordinator", "rankfleet.coordinator", "serve", "--config", str(self.config)
        )
        for _ in range(300):
            if api.exists():
                with contextlib.suppress(Exception):
                    Client(self.home / "coordinator").get("/health")
                    return Client(self.home / "coordinator")
            if self.coordinator.poll() is not None:
                raise RuntimeError((self.home / "coordinator.log").read_text()[-2000:])
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.coordinator.wait(0.1)
        raise RuntimeError("the coordinator did not start")

    model_name = "all-MiniLM-L6-v2"

    def enrol(self, client: Client, data: dict[str, Path]) -> None:
        """Invite and enrol every device; each makes its own key."""
        for d in self.spec.devices:
            config = self.write(
                self.home / d.name / "agent.yaml",
                {
                    "state_dir": str(self.home / d.name / "state"),
                    "profile": d.profile,
                    "threads": d.threads,
                    "model_budget_mb": d.model_budget_mb,
                    "models": {self.model_name: str(self.model)},
                    "datasets": {
                        "docs": {"path": str(data[d.name]), "columns": {"text": "text", "label": "label"}}
                    },
                    "link": {"up_kbps": d.up_kbps, "packet_bytes": self.spec.packet_bytes, "answer_s": 3},
                },
            )
            token = client.post(f"/devices/{d.name}/invite")["token"]
            self.run("rankfleet.edge_agent", "enroll", token, "--no-probe", "--config", str(config))

    def agent(self, name: str) -> None:
        """Start one agent."""
        self.agents[name] = self.start(
            name, "rankfleet.edge_agent", "run", "--config", str(self.home / name / "agent.yaml")
        )

    def kill_agent(self, name: str) -> None:
        """kill -9, no farewell."""
        os.kill(self.agents[name].pid, signal.SIGKILL)
        self.agents[name].wait()

    def kill_broker(self) -> str:
        """kill -9 the broker; the coordinator starts another. Returns its name."""
        assert self.coordinator is not None
        for child in psutil.Process(self.coordinator.pid).children(recursive=True):
            line = " ".join(child.cmdline())
            if "mosquitto" in line or "amqtt_broker" in line:
                child.kill()
                return "mosquitto" if "mosquitto" in line else "amqtt"
        raise RuntimeError("no broker is running")

    def status(self, name: str) -> dict[str, Any]:
        """What an agent's status file says; empty before the first."""
        with contextlib.suppress(OSError, ValueError):
            found: dict[str, Any] = json.loads((self.home / name / "state" / "status.json").read_text())
            return found
        return {}

    def idle_rss_mb(self, name: str) -> float:
        """VmRSS of an agent with its children."""
        process = psutil.Process(self.agents[name].pid)
        return float(sum(p.memory_info().rss for p in [process, *process.children(recursive=True)])) / (
            1 << 20
        )

    def stop(self) -> None:
        """End everything."""
        for process in [*self.agents.values(), *([self.coordinator] if self.coordinator else [])]:
            with contextlib.suppress(ProcessLookupError):
                process.terminate()
        for process in [*self.agents.values(), *([self.coordinator] if self.coordinator else [])]:
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
