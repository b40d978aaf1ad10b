"""Programs under test: a coordinator, agents behind proxies, and a Mosquitto with persistence."""

import asyncio
import contextlib
import json
import os
import random
import shutil
import sqlite3
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import yaml

from rankfleet.coordinator.broker.child import free_port, mosquitto
from tests.world import job, rows

from .proxy import Proxy

ROOT = Path(__file__).parent.parent.parent
AGENTS = ("d0", "d1", "d2")


class Machine:
    """A node: a home on a disk that forgets, and the command that runs on it."""

    def __init__(self, folder: Path, name: str, rng: random.Random) -> None:
        self.name, self.rng = name, rng
        self.home, self.side, self.log = folder / name, folder / f"{name}.side", folder / f"{name}.log"
        self.home.mkdir()
        (self.side / "content").mkdir(parents=True)
        self.command: list[str] = []
        self.process: subprocess.Popen[bytes] | None = None
        self.starts = 0

    def environment(self) -> dict[str, str]:
        shim = str(Path(__file__).parent / "shim")
        return {
            **os.environ,
            "PYTHONPATH": f"{shim}{os.pathsep}{ROOT}",
            "CHAOS_HOME": str(self.home),
            "CHAOS_SIDE": str(self.side),
        }

    def run(self, *words: str) -> str:
        """A verb of the CLI, on this machine."""
        command = [sys.executable, "-W", "ignore", "-m", *words]
        done = subprocess.run(
            command, capture_output=True, text=True, check=False, env=self.environment(), cwd=ROOT
        )
        if done.returncode:
            raise RuntimeError(f"{' '.join(words)}: {done.stderr}")
        return done.stdout

    def start(self) -> None:
        """As a service manager would: one at a time."""
        if self.process is not None and self.process.poll() is None:
            return
        self.starts += 1
        with self.log.open("ab") as log:
            command = [sys.executable, "-W", "ignore", "-m", *self.command]
            self.process = subprocess.Popen(command, stdout=log, stderr=log, env=self.environment(), cwd=ROOT)

    def everything(self) -> list[psutil.Process]:
        """The program and all that it started."""
        if self.process is None:
            return []
        with contextlib.suppress(psutil.Error):
            main = psutil.Process(self.process.pid)
            return [main, *main.children(recursive=True)]
        return []

    def supervise(self) -> None:
        """A program that ended by itself is started again, as its unit says (`Restart=always`)."""
        if self.process is not None and self.process.poll() is not None:
            self.start()

    def kill(self) -> None:
        """`kill -9`; children end with their parent, as the product promises."""
        if self.process:
            self.process.kill()
            self.process.wait()
            self.process = None

    def kill_worker(self) -> bool:
        """Only the training process."""
        workers = [p for p in self.everything()[1:] if "rankfleet.edge_agent.worker" in " ".join(_words(p))]
        for p in workers:
            p.kill()
        return bool(workers)

    def cut_power(self) -> None:
        """Kill everything at once, and leave on the disk what a power cut leaves."""
        family = self.everything()
        for p in family:
            with contextlib.suppress(psutil.Error):
                p.suspend()
        for p in family:
            with contextlib.suppress(psutil.Error):
                p.kill()
        if self.process:
            self.process.wait()
            self.process = None
        psutil.wait_procs(family, 5)
        self._forget()

    def _forget(self) -> None:
        here = {
            str(p.relative_to(self.home)): p for p in self.home.rglob("*") if p.is_file() or p.is_symlink()
        }
        inodes = {p.lstat().st_ino: p for p in here.values()}
        try:
            durable: dict[str, int] = json.loads((self.side / "names.json").read_text())
        except (OSError, ValueError):
            durable = {}
        now = {name: p.lstat().st_ino for name, p in here.items()}
        ledger = {n: i for n, i in now.items() if n.startswith("ledger.db")}
        names = {**durable, **ledger} if durable and self.rng.random() < 0.5 else now
        image = self.home.with_name(f"{self.name}.next")
        image.mkdir()
        for name, inode in sorted(names.items()):
            target = image / name
            if name.endswith(os.sep):
                target.mkdir(parents=True, exist_ok=True)
                continue
            target.parent.mkdir(parents=True, exist_ok=True)
            live = inodes.get(inode)
            if live is not None and live.is_symlink():
                target.symlink_to(os.readlink(live))
            else:
                target.write_bytes(self._survives(name, inode, live.read_bytes() if live else None))
        shutil.rmtree(self.home)
        image.rename(self.home)
        self.home.chmod(0o700)
        self.remember()

    def _survives(self, name: str, inode: int, live: bytes | None) -> bytes:
        kept = self.side / "content" / str(inode)
        durable = kept.read_bytes() if kept.exists() else b""
        if live is None or live == durable:
            return durable
        if name.startswith("ledger.db"):
            return live
        fate = self.rng.random()
        return durable if fate < 0.4 else live if fate < 0.6 else live[: self.rng.randrange(len(live) + 1)]

    def remember(self) -> None:
        """All that is there now is durable."""
        shutil.rmtree(self.side / "content", ignore_errors=True)
        (self.side / "content").mkdir()
        (self.side / "names.json").unlink(missing_ok=True)
        for path in self.home.rglob("*"):
            if path.is_file() and not path.is_symlink() and not path.name.startswith("ledger.db"):
                shutil.copyfile(path, self.side / "content" / str(path.stat().st_ino))

    def set_clock(self, wrong_by_s: float) -> None:
        (self.side / "clock").write_text(str(wrong_by_s))

    def fill_disk(self, full: bool) -> None:
        (self.side / "full").touch() if full else (self.side / "full").unlink(missing_ok=True)


def _words(process: psutil.Process) -> list[str]:
    with contextlib.suppress(psutil.Error):
        return process.cmdline()
    return []


class Fleet:
    """Everything that a run needs, in one folder."""

    def __init__(self, folder: Path, model: Path, rng: random.Random) -> None:
        self.folder, self.model, self.rng = folder, model, rng
        folder.mkdir(parents=True, exist_ok=True)
        self.port = free_port()
        self.broker: subprocess.Popen[bytes] | None = None
        self.coordinator = Machine(folder, "coordinator", rng)
        self.agents = {name: Machine(folder, name, rng) for name in AGENTS}
        self.proxies = {name: Proxy(self.port, rng) for name in AGENTS}

    @property
    def machines(self) -> list[Machine]:
        return [self.coordinator, *self.agents.values()]

    def start_broker(self, forget: bool = False) -> None:
        """Retained messages are on disk after a second at most; `forget` loses them."""
        store = self.folder / "broker"
        if forget:
            shutil.rmtree(store, ignore_errors=True)
        store.mkdir(exist_ok=True)
        store.chmod(0o777)
        conf = self.folder / "mosquitto.conf"
        conf.write_text(
            f"listener {self.port} 127.0.0.1\nallow_anonymous true\n"
            f"persistence true\npersistence_location {store}/\n"
            "autosave_interval 1\nautosave_on_changes true\nmax_queued_messages 0\n"
        )
        self.broker = subprocess.Popen(
            [mosquitto() or "mosquitto", "-c", str(conf)],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )

    def kill_broker(self) -> None:
        if self.broker:
            self.broker.kill()
            self.broker.wait()

    def write(self, name: str, data: Any) -> str:
        (self.folder / name).write_text(yaml.safe_dump(data))
        return str(self.folder / name)

    async def start(self) -> None:
        """Enrol everybody, without faults."""
        self.start_broker()
        c = self.coordinator
        config = {
            "data_dir": str(c.home), "broker": {"url": f"mqtt://127.0.0.1:{self.port}"},
            "models": {"tiny": str(self.model)},
            "limits": {"packet_bytes": 2000, "nudge_s": 3},
        }  # fmt: skip
        self.config = self.write("coordinator.yaml", config)
        c.command = ["rankfleet.coordinator", "serve", "--config", self.config]
        c.start()
        await self.until(lambda: (c.home / "api.json").exists(), 60)
        for i, (name, machine) in enumerate(self.agents.items()):
            await self.proxies[name].start()
            data = self.folder / f"{name}.jsonl"
            data.write_text("\n".join(json.dumps(r) for r in rows(60, i)))
            path = self.write(
                f"{name}.yaml",
                {
                    "state_dir": str(machine.home), "profile": "laptop-x86-16gb", "threads": 1,
                    "models": {"tiny": str(self.model)},
                    "datasets": {"words": {"path": str(data)}},
                    "link": {"answer_s": 1, "packet_bytes": 600,
                    "broker": f"mqtt://127.0.0.1:{self.proxies[name].port}"},
                },
            )  # fmt: skip
            token = c.run("rankfleet.coordinator", "invite", name, "--config", self.config).strip()
            machine.run("rankfleet.edge_agent", "enroll", token, "--no-probe", "--config", path)
            machine.command = ["rankfleet.edge_agent", "run", "--config", path]
            machine.start()
        await self.until(
            lambda: sum(r[0] == "enrolled" for r in self.ask("select state from devices")) == len(AGENTS), 60
        )
        for machine in self.machines:
            machine.remember()

    def submit(self, **changes: Any) -> None:
        """One job, fixed arms unless `changes` say otherwise, no deadline, everybody."""
        settings = {
            "stack": ["sparse"], "quorum": 1.0, "min_devices": len(AGENTS),
            "arms": {"ranks": [4], "bits": [32], "steps": [40], "batch": 4},
            **changes,
        }  # fmt: skip
        (self.folder / "job.yaml").write_text(job(**settings))
        self.coordinator.run(
            "rankfleet.coordinator", "submit", str(self.folder / "job.yaml"), "--config", self.config
        )

    def ask(self, query: str) -> list[Any]:
        """Straight from the ledger: the coordinator may be dead."""
        try:
            with contextlib.closing(
                sqlite3.connect(f"file:{self.coordinator.home}/ledger.db?mode=ro", uri=True, timeout=2)
            ) as ledger:
                return ledger.execute(query).fetchall()
        except sqlite3.Error:
            return []

    def job_state(self) -> str:
        found = self.ask("select state from jobs")
        return str(found[0][0]) if found else ""

    async def until(self, what: Any, seconds: float) -> None:
        for _ in range(int(seconds / 0.1)):
            if what():
                return
            await asyncio.sleep(0.1)
        tails = "\n".join(
            f"--- {m.name}\n{m.log.read_text()[-1500:]}" for m in self.machines if m.log.exists()
        )
        raise TimeoutError(f"not within {seconds:.0f} s; logs:\n{tails}")

    async def stop(self) -> None:
        for machine in self.machines:
            machine.kill()
        self.kill_broker()
        for proxy in self.proxies.values():
            await proxy.stop()
