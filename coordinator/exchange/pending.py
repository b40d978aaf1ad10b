"""Assignments that are open, in memory: who is still out, and since when.

The ledger is the truth; this spares asking it for every message.
"""

import time
from typing import NamedTuple

Key = tuple[str, int, str]
"""(job, round, device)."""


LONGEST_S = 30 * 86_400.0


class Open(NamedTuple):
    """One open assignment."""

    tick: float
    """`time.monotonic` when the device was told."""
    purpose: str

    def seconds(self) -> float:
        """How long ago that was."""
        return max(0.001, time.monotonic() - self.tick)


class Pending:
    """Open assignments of the rounds that may still be answered."""

    def __init__(self) -> None:
        self._open: dict[Key, Open] = {}
        self._out: dict[tuple[str, int], int] = {}

    def add(self, job: str, round: int, device: str, age_s: float, purpose: str) -> None:
        """A device was told what to do, `age_s` ago."""
        if (job, round, device) not in self._open:
            self._out[job, round] = self._out.get((job, round), 0) + 1
        self._open[job, round, device] = Open(time.monotonic() - min(max(0.0, age_s), LONGEST_S), purpose)

    def get(self, key: Key) -> Open | None:
        """The assignment, while nobody has answered it."""
        return self._open.get(key)

    def done(self, key: Key) -> None:
        """It was answered, one way or the other."""
        if self._open.pop(key, None) is not None:
            self._out[key[:2]] -= 1

    def of(self, device: str) -> list[Key]:
        """What a device has not answered."""
        return [key for key in self._open if key[2] == device]

    def out(self, job: str, round: int) -> int:
        """How many have not answered."""
        return self._out.get((job, round), 0)

    def close(self, job: str, round: int) -> None:
        """The round is over; what still comes is looked up in the ledger."""
        for key in [k for k in self._open if k[:2] == (job, round)]:
            del self._open[key]
        self._out.pop((job, round), None)
