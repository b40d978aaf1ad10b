"""flwr beside us: two SuperNodes in deployment mode, 100 clients in its simulation, and what an idle
SuperNode takes.

Looked for in `$RANKFLEET_FLWR` (a virtual environment); made under ~/.cache on the first run where pip can
reach an index.
"""

import contextlib
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil

VERSION = "1.41.0"
APP = Path(__file__).parent / "peers" / "flwr_noise"


def environment() -> Path:
    """flwr's own virtual environment. Raises OSError or CalledProcessError where it cannot be had."""
    home = Path(os.environ.get("RANKFLEET_FLWR", Path.home() / ".cache" / f"rankfleet-flwr-{VERSION}"))
    if not (home / "bin" / "flwr").exists():
        subprocess.run([sys.executable, "-m", "venv", str(home)], check=True)
        subprocess.run(
            [str(home / "bin" / "pip"), "install", "-q", f"flwr=={VERSION}", "ray", "numpy"], check=True
        )
    return home


class Flwr:
    """Its processes, under one folder."""

    def __init__(self, home: Path) -> None:
        self.home, self.bin = home, environment() / "bin"
        self.processes: list[subprocess.Popen[bytes]] = []
        self.env = {
            **os.environ, "FLWR_HOME": str(home / "flwr"), "FLWR_TELEMETRY_ENABLED": "0",
            "PATH": f"{self.bin}:{os.environ['PATH']}",
        }  # fmt: skip
        (home / "flwr").mkdir(parents=True, exist_ok=True)
        (home / "flwr" / "config.toml").write_text(
            '[superlink]\ndefault = "here"\n\n[superlink.here]\naddress = "127.0.0.1:8000"\ninsecure = true\n'
        )
        shutil.copytree(APP, home / "app" / "flwr_noise", dirs_exist_ok=True)
        shutil.move(home / "app" / "flwr_noise" / "pyproject.toml", home / "app" / "pyproject.toml")

    def start(self, *words: str) -> psutil.Process:
        """A program in the background."""
        with (self.home / "log").open("ab") as log:
            made = subprocess.Popen(
                [str(self.bin / words[0]), *words[1:]],
                stdout=log,
                stderr=log,
                env=self.env,
                cwd=self.home / "app",
            )
        self.processes.append(made)
        return psutil.Process(made.pid)

    def __enter__(self) -> "Flwr":
        return self

    def __exit__(self, *error: object) -> None:
        for process in reversed(self.processes):
            with contextlib.suppress(psutil.Error):
                for child in psutil.Process(process.pid).children(recursive=True):
                    child.kill()
            process.kill()
            process.wait()


def _rate(times: list[list[float]]) -> tuple[float, float]:
    """(seconds a round, updates a second), the first two rounds left out."""
    took = times[-1][0] - times[1][0]
    return took / (len(times) - 2), sum(n for _, n in times[2:]) / took


def deployment(home: Path, rounds: int = 12) -> dict[str, float]:
    """Two SuperNodes, insecure gRPC as its quickstart has it."""
    out = home / "times.json"
    with Flwr(home) as flwr:
        flwr.start("flower-superlink", "--insecure", "--disable-runtime-dependency-installation")
        time.sleep(6)
        nodes = [
            flwr.start(
                "flower-supernode", "--insecure", "--superlink", "127.0.0.1:8000", "--port", str(9094 + n)
            )
            for n in range(2)
        ]
        time.sleep(10)
        idle = max(sum(p.memory_info().rss for p in [n, *n.children(recursive=True)]) for n in nodes) / (
            1 << 20
        )
        flwr.start("flwr", "run", ".", "here", "--run-config", f"rounds={rounds} clients=2 out='{out}'")
        times = _wait(out, home / "log", 300)
    return {"flwr_round_s_2_nodes": _rate(times)[0], "flwr_idle_rss_mb": idle}


def simulation(home: Path, clients: int = 100, rounds: int = 7) -> dict[str, float]:
    """Its in-memory simulation."""
    out = home / "times.json"
    with Flwr(home) as flwr:
        flwr.start(
            "python", str(home / "app" / "flwr_noise" / "noise_app.py"), str(clients), str(rounds), str(out)
        )
        times = _wait(out, home / "log", 400)
    return {"flwr_updates_per_s_100_clients": _rate(times)[1]}


def _wait(out: Path, log: Path, seconds: float) -> list[list[float]]:
    end = time.time() + seconds
    while not out.exists() or not out.read_text():
        if time.time() > end:
            raise RuntimeError(log.read_text()[-2000:])
        time.sleep(1)
    found: list[list[float]] = json.loads(out.read_text())
    return found


def measure(home: Path) -> dict[str, Any]:
    """Everything, or why not."""
    found: dict[str, Any] = {"flwr_version": VERSION}
    for run in (deployment, simulation):
        folder = home / run.__name__
        folder.mkdir(parents=True, exist_ok=True)
        try:
            found |= {k: round(v, 3) for k, v in run(folder).items()}
        except Exception as error:
            found[f"flwr_{run.__name__}_error"] = str(error)[-400:]
        print({k: v for k, v in found.items() if k.startswith("flwr")}, flush=True)
    return found


if __name__ == "__main__":
    import tempfile

    print(measure(Path(tempfile.mkdtemp(prefix="rankfleet-flwr-"))))
