"""Devices that are silent are asked again."""

import math
from typing import TYPE_CHECKING

from rankfleet.federated.wire.messages import read_assignment

if TYPE_CHECKING:
    from .run import JobRunner


class Nudges:
    """Brokers lose messages: a device that is silent is sent its assignment again, after `patience_s`,
    then twice as long."""

    def __init__(self, patience_s: float) -> None:
        self.patience_s = patience_s
        self._due: dict[tuple[int, str], tuple[float, float]] = {}
        self._next = self._began = 0.0

    def send(self, run: "JobRunner", number: int) -> None:
        """Nudge whoever is due."""
        now = run.ticks()
        if now < self._next:
            return
        self._next = math.inf
        for row in run.ledger.answers(run.job, number, state="assigned"):
            key = (row["round"], row["device"])
            due, wait = self._due.get(key, (self._began + self.patience_s, self.patience_s))
            if now >= due:
                run.fleet.publish(row["device"], read_assignment(row["body"]))
                due, wait = now + 2 * wait, min(2 * wait, 600.0)
            self._due[key] = (due, wait)
            self._next = min(self._next, due)
        self._next = min(self._next, now + self.patience_s)

    def start(self, now: float) -> None:
        """A round opens: nobody is due before the patience has passed."""
        self._due.clear()
        self._began = now
        self._next = now + self.patience_s
