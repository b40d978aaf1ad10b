"""What the agent is doing and what it cost, on disk: `status.json` for people, `counters.json` for the
next start."""

import logging
import os
import time
from pathlib import Path
from typing import Any

import msgspec

from rankfleet.federated.program.files import write_atomic
from rankfleet.federated.transport.bus import Bus

log = logging.getLogger(__name__)
OFTEN_S = 3.0
"""Status is for people: cards wear out, and a journal that is busy makes every write wait."""
SAVE_BYTES, SAVE_S = 16 << 20, 10.0
"""Counters go to disk when so much was counted, or so long ago: a kill forgets no more."""


class Counters(msgspec.Struct):
    """Bytes of MQTT payload since enrolment, and today's."""

    up: int = 0
    down: int = 0
    day: str = ""
    today: int = 0
    jobs_done: int = 0
    done_at: float = 0.0

    @staticmethod
    def load(path: Path) -> "Counters":
        """From disk; zeros where there is nothing readable."""
        try:
            return msgspec.json.decode(path.read_bytes(), type=Counters)
        except (OSError, msgspec.MsgspecError):
            return Counters()

    def save(self, path: Path) -> None:
        """Safe against a kill; a power cut may lose the last minute's count."""
        write_atomic(path, msgspec.json.encode(self), durable=False)


class Status:
    """Facts by name, and the bytes that went over the bus."""

    def __init__(self, home: Path, bus: Bus, **facts: Any) -> None:
        self.home, self.bus = home, bus
        self.facts: dict[str, Any] = {"state": "connecting", **facts}
        self.counters = Counters.load(home / "counters.json")
        self._seen = (0, 0)
        self._looked = -1e9
        self._stale, self._written = True, -OFTEN_S
        self._saved = (self.counters.up + self.counters.down, time.monotonic())

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

    def every(self, seconds: float) -> bool:
        """True at most once in so many seconds."""
        now = time.monotonic()
        due = now - self._looked >= seconds
        self._looked = now if due else self._looked
        return due

    def count(self) -> bool:
        """Bring the byte counters up to date; True where they moved."""
        now, counters = (self.bus.sent, self.bus.received), self.counters
        if counters.day != (day := time.strftime("%Y-%m-%d")):
            counters.day, counters.today = day, 0
        up, down = now[0] - self._seen[0], now[1] - self._seen[1]
        moved, self._seen = now != self._seen, now
        counters.up, counters.down, counters.today = (
            counters.up + up,
            counters.down + down,
            counters.today + up + down,
        )
        total = counters.up + counters.down
        if abs(total - self._saved[0]) > SAVE_BYTES or (
            total != self._saved[0] and time.monotonic() - self._saved[1] > SAVE_S
        ):
            self.save()
        return moved

    def save(self) -> None:
        """Counters to disk; a full disk is logged, never fatal."""
        self._saved = (self.counters.up + self.counters.down, time.monotonic())
        try:
            self.counters.save(self.home / "counters.json")
        except OSError as error:
            log.warning("counters: %s", error)

    def write(self, **facts: Any) -> None:
        """Remember facts and bring them to disk, now or, where that was done a moment ago, with the next
        `flush`."""
        self.facts |= facts
        self._stale = True
        self.flush()

    def flush(self, now: bool = False) -> None:
        """To disk, if anything is new and the last time was not a moment ago, or `now`; a full disk is
        logged, never fatal."""
        stale = self._stale or self.facts.get("connected") != self.bus.connected.is_set()
        if not stale or (not now and time.monotonic() - self._written <= OFTEN_S):
            return
        self._stale, self._written = False, time.monotonic()
        c = self.counters
        self.facts |= {
            "connected": self.bus.connected.is_set(), "bytes_up": c.up, "bytes_down": c.down,
            "pid": os.getpid(), "at": time.time(),
            "jobs_done": c.jobs_done, "job_done_at": c.done_at, "problem": getattr(self.bus, "problem", ""),
        }  # fmt: skip
        try:
            write_atomic(self.home / "status.json", msgspec.json.encode(self.facts), durable=False)
        except OSError as error:
            log.warning("status: %s", error)
