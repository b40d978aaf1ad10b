"""How much one device may say: a device that floods, or sends what cannot be read again and again, is
slowed down, then suspended.

Every device has a bucket of messages that fills steadily. An empty bucket, and everything that had to be
refused, is a strike; strikes are forgiven one by one. After a few, nothing of the device is read for a
while, each time twice as long; after more, it is suspended until an operator lets it go on. What is
dropped is not lost: an honest device sends again until it is answered.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass

from ..config import Limits

SLOW_AT, SUSPEND_AT = 3, 10
FORGIVEN_S = 600.0
LONGEST_S = 600.0
STRIKE_EVERY_S = 1.0


@dataclass
class Standing:
    """One device."""

    left: float
    at: float
    strikes: float = 0.0
    struck: float = -1e9
    quiet_until: float = 0.0
    reason: str = ""


class Admission:
    """Buckets and strikes, in memory: a restart forgives."""

    def __init__(
        self, limits: Limits, suspend: Callable[[str, str], None], clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.limits, self._suspend, self._clock = limits, suspend, clock
        self._known: dict[str, Standing] = {}
        self.dropped = 0

    def _standing(self, device: str) -> Standing:
        now, burst = self._clock(), float(self.limits.burst)
        s = self._known.get(device)
        if s is None:
            s = self._known[device] = Standing(burst, now)
        passed = max(0.0, now - s.at)
        s.left = min(burst, s.left + passed * self.limits.messages_per_s)
        s.strikes = max(0.0, s.strikes - passed / FORGIVEN_S)
        s.at = now
        return s

    def take(self, device: str) -> bool:
        """May one more message be read now?"""
        s = self._standing(device)
        if s.at < s.quiet_until:
            self.dropped += 1
            return False
        s.left -= 1.0
        if s.left >= 0.0:
            return True
        s.left = 0.0
        self.dropped += 1
        self.strike(device, f"more than {self.limits.messages_per_s:g} messages a second")
        return False

    def strike(self, device: str, reason: str) -> None:
        """Something of a device had to be refused; at most one strike a second."""
        s = self._standing(device)
        if s.at - s.struck < STRIKE_EVERY_S:
            return
        s.strikes, s.struck, s.reason = s.strikes + 1.0, s.at, reason
        if s.strikes > SUSPEND_AT - 0.5:
            self._known.pop(device)
            self._suspend(device, reason)
        elif s.strikes > SLOW_AT - 0.5:
            s.quiet_until = s.at + min(LONGEST_S, 2.0 ** (s.strikes - SLOW_AT))

    def slowed(self, device: str) -> str:
        """Why a device is not read at present; empty if it is."""
        s = self._known.get(device)
        return s.reason if s is not None and self._clock() < s.quiet_until else ""
