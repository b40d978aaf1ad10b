"""Wait until a round may close: quorum, deadline, a method's own rule; ask devices that are silent; start again if all failed."""

import math
from typing import TYPE_CHECKING

from rankfleet.federated.errors import ConfigError
from rankfleet.federated.wire.messages import read_assignment

from ..store.database import Row
from . import opening, verdict

if TYPE_CHECKING:
    from collections.abc import Sequence

    from .run import JobRunner

ATTEMPTS = 5
LOOK_S = 1.0
LONG_S = 30 * 86_400.0
"""A round that seems older than this was opened under another clock."""


class Nudges:
    """Brokers lose messages: a device that is silent is sent its assignment again, after `patience_s`, then twice as long."""

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


async def until_closable(run: "JobRunner", number: int) -> None:
    """Returns when the round may close. Raises ConfigError when every device failed again and again."""
    for _ in range(ATTEMPTS):
        began = run.ticks()
        run.nudges.start(began)
        row = run.ledger.round(run.job, number)
        # What passed before a restart is known by the clock alone; a clock that was set back counts as nothing.
        before = max(0.0, run.clock() - float(row["opened"])) if row is not None else 0.0
        before = before if before < LONG_S else 0.0
        looked = -math.inf
        while True:
            # As long as somebody is out and no rule but the clock could close the round, the ledger is asked once a second.
            if run.server.stack.using("ready") or not run.pending.out(run.job, number) or run.ticks() - looked >= LOOK_S:
                looked = run.ticks()
                row = run.ledger.round(run.job, number)
                assert row is not None
                if row["state"] == "closing":
                    return
                columns = ("state", "reason", "device", "telemetry", "arm", "seconds")
                rows = run.ledger.answers(run.job, number, *columns)
                if all(r["state"] in ("failed", "refused") for r in rows):
                    break
                if may_close(run, rows, row, number, before + run.ticks() - began):
                    return
            run.nudges.send(run, number)
            await run.change(min(LOOK_S, run.nudges.patience_s))
        await again(run, number, rows)
    raise ConfigError(f"round {number}: every device failed {ATTEMPTS} times; the last reason: {rows[-1]['reason']}")


def may_close(run: "JobRunner", rows: "Sequence[Row]", row: Row, number: int, waited: float) -> bool:
    """Everybody answered, a method says so, or quorum and deadline are met `waited` seconds after the opening."""
    spec = run.plan.spec
    arrived = sum(1 for r in rows if r["state"] == "received")
    still_out = sum(1 for r in rows if r["state"] == "assigned")
    if run.server.ready(arrived, len(rows), number) or not still_out:
        return arrived >= 1
    limit = 2 * float(row["expected_s"]) + 30 if spec.deadline_s == "auto" else float(spec.deadline_s)
    if not limit or waited < limit or arrived < min(spec.min_devices, len(rows)):
        return False
    return arrived >= spec.quorum * len(rows) or (arrived >= 1 and waited >= 3 * limit)


async def again(run: "JobRunner", number: int, rows: "Sequence[Row]") -> None:
    """Every device failed: let the tuner learn why, and open the same round once more."""
    eligible = run.fleet.eligible(run.plan)
    known, bits = {d: p for d, (p, _) in eligible.items()}, {d: b for d, (_, b) in eligible.items()}
    run.tuner.observe([verdict.outcome(r, known[r["device"]].name) for r in rows if r["device"] in known], known, bits)
    for r in rows:
        run.ledger.tell(run.job, r["device"], f"round {number} starts again: {r['reason']}")
    run.pending.close(run.job, number)
    await run.change(2.0)
    with run.ledger.write() as tx:
        tx.forget_round(run.job, number)
    await opening.open_round(run, number)
