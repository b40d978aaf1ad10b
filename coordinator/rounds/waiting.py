"""Wait until a round may close: quorum, deadline, a method's own rule; ask devices that are silent; start
again if all failed."""

import math
from typing import TYPE_CHECKING

from rankfleet.federated.contract.contexts import Arrival

from ..store import database
from ..store.database import Row
from . import verdict

if TYPE_CHECKING:
    from collections.abc import Sequence

    from .run import JobRunner

LOOK_S = 1.0
LONG_S = 30 * 86_400.0
"""A round that seems older than this was opened under another clock."""


async def until_closable(run: "JobRunner", number: int) -> "list[Row]":
    """Returns when the round may close; with its answers where every device failed, and it has to be
    opened again."""
    began = run.ticks()
    run.nudges.start(began)
    row = run.ledger.round(run.job, number)
    # What passed before a restart is known by the clock alone; a clock that was set back counts as nothing.
    before = max(0.0, run.clock() - float(row["opened"])) if row is not None else 0.0
    before = before if before < LONG_S else 0.0
    looked = -math.inf
    while True:
        # As long as somebody is out and no rule but the clock could close the round, the ledger is asked once
        # a second.
        if (
            run.server.stack.using("ready")
            or not run.pending.out(run.job, number)
            or run.ticks() - looked >= LOOK_S
        ):
            looked = run.ticks()
            row = run.ledger.round(run.job, number)
            assert row is not None
            if row["state"] == "closing":
                return []
            columns = ("state", "reason", "device", "telemetry", "arm", "seconds")
            rows = run.ledger.answers(run.job, number, *columns)
            if all(r["state"] in ("failed", "refused") for r in rows):
                return rows
            if may_close(run, rows, row, number, before + run.ticks() - began):
                return []
        run.nudges.send(run, number)
        await run.change(min(LOOK_S, run.nudges.patience_s))


def may_close(run: "JobRunner", rows: "Sequence[Row]", row: Row, number: int, waited: float) -> bool:
    """Everybody answered, a method says so, or quorum and deadline are met `waited` seconds after the
    opening."""
    spec = run.plan.spec
    arrived = sum(1 for r in rows if r["state"] == "received")
    still_out = sum(1 for r in rows if r["state"] == "assigned")
    if not still_out or says_ready(run, rows, number, waited):
        return arrived >= 1
    limit = 2 * float(row["expected_s"]) + 30 if spec.deadline_s == "auto" else float(spec.deadline_s)
    if not limit or waited < limit or arrived < min(spec.min_devices, len(rows)):
        return False
    return arrived >= spec.quorum * len(rows) or (arrived >= 1 and waited >= 3 * limit)


def says_ready(run: "JobRunner", rows: "Sequence[Row]", number: int, waited: float) -> bool:
    """Does a method of the stack close the round?"""
    if not run.plan.stack.using("ready"):
        return False
    arrived = [
        Arrival(r["device"], float(r["seconds"]), database.read(r["telemetry"]))
        for r in rows
        if r["state"] == "received"
    ]
    return bool(
        run.server.ready(arrived, [r["device"] for r in rows if r["state"] == "assigned"], waited, number)
    )


async def forget(run: "JobRunner", number: int, rows: "Sequence[Row]") -> None:
    """Every device failed: let the tuner learn why, and take the round back."""
    eligible = run.fleet.eligible(run.plan)
    known, bits = {d: p for d, (p, _) in eligible.items()}, {d: b for d, (_, b) in eligible.items()}
    run.tuner.observe(
        [verdict.outcome(r, known[r["device"]].name) for r in rows if r["device"] in known], known, bits
    )
    for r in rows:
        run.ledger.tell(run.job, r["device"], f"round {number} starts again: {r['reason']}")
    run.pending.close(run.job, number)
    await run.change(2.0)
    with run.ledger.write() as tx:
        tx.forget_round(run.job, number)
