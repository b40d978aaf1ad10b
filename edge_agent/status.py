"""What the agent is doing and what it cost, on disk: `status.json` for people, `counters.json` for the next start."""

import logging
import os
import time
from pathlib import Path
from typing import Any

import msgspec

from federated.bus import Bus
from federated.files import write_atomic

from .outbox import Counters

log = logging.getLogger(__name__)


class Status:
    """Facts by name, and the bytes that went over the bus."""

    def __init__(self, home: Path, bus: Bus, **facts: Any) -> None:
        self.home, self.bus = home, bus
        self.facts: dict[str, Any] = {"state": "connecting", **facts}
        self.counters = Counters.load(home / "counters.json")
        self._seen = (0, 0)

    def __getitem__(self, name: str) -> Any:
        return self.facts[name]

    def get(self, name: str, default: Any = None) -> Any:
        """A fact, or `default`."""
        return self.facts.get(name, default)

    def set(self, **facts: Any) -> None:
        """Remember facts; they are written with the next `write`."""
        self.facts |= facts

    def fail(self, reason: str) -> None:
        """The last thing that went wrong."""
        self.facts["last_error"] = reason

    def count(self) -> bool:
        """Bring the byte counters up to date; True where they moved."""
        now, counters = (self.bus.sent, self.bus.received), self.counters
        if counters.day != (day := time.strftime("%Y-%m-%d")):
            counters.day, counters.today = day, 0
        up, down = now[0] - self._seen[0], now[1] - self._seen[1]
        moved, self._seen = now != self._seen, now
        counters.up, counters.down, counters.today = counters.up + up, counters.down + down, counters.today + up + down
        if moved:
            counters.save(self.home / "counters.json")
        return moved

    def write(self, **facts: Any) -> None:
        """To disk; a full disk is logged, never fatal."""
        c = self.counters
        self.facts |= {
            **facts, "connected": self.bus.connected.is_set(), "bytes_up": c.up, "bytes_down": c.down,
            "pid": os.getpid(), "at": time.time(),
            "jobs_done": c.jobs_done, "job_done_at": c.done_at, "problem": getattr(self.bus, "problem", ""),
        }  # fmt: skip
        try:
            write_atomic(self.home / "status.json", msgspec.json.encode(self.facts))
        except OSError as error:
            log.warning("status: %s", error)
