"""Would the tuner choose the same arms again from what the ledger recorded, without any kill or restart in
between?"""

from pathlib import Path
from types import SimpleNamespace

import msgspec

from rankfleet.bandit.tuner import Tuner
from rankfleet.coordinator.fleet.devices import Devices
from rankfleet.coordinator.jobs.plan import Plan
from rankfleet.coordinator.jobs.spec import read_job
from rankfleet.coordinator.rounds import opening, verdict
from rankfleet.coordinator.store import database, tables
from rankfleet.coordinator.store.ledger import Ledger
from rankfleet.profiles.card import read_card


def replayed(data_dir: Path, model: Path) -> tuple[int, int]:
    """(arms in the ledger, of which a fresh tuner that is told the same chooses the same)."""
    ledger = Ledger(f"sqlite:///{data_dir / 'ledger.db'}")
    try:
        row = ledger.rows(tables.jobs)[0]
        plan = Plan(read_job(row["text"]), read_card(model))
        members = Devices(ledger).eligible(plan)
        tuner = Tuner(
            plan.policy, plan.card, plan.modules, plan.spec.arms, max_depth=plan.max_depth,
            length=plan.spec.task.max_length,
            head=plan.head_size, wire_bits=plan.stack.wire_bits, seed=plan.spec.seed, state=None,
        )  # fmt: skip
        total = same = 0
        run = SimpleNamespace(examples={})
        for number in range(plan.spec.rounds):
            rows = {r["device"]: r for r in ledger.rows(tables.assignments, job=row["id"], round=number)}
            for device, (profile, bits_ms) in sorted(members.items()):
                tuner.join(device, profile, bits_ms)
            shares = opening.data_shares(run, sorted(rows))  # type: ignore[arg-type]
            choices = tuner.choose(number, [(d, members[d][0], shares[d]) for d in sorted(rows)])
            total += len(rows)
            same += sum(
                database.text(msgspec.to_builtins(choices[d].arm)) == r["arm"] for d, r in rows.items()
            )
            info = ledger.row(tables.rounds, job=row["id"], number=number)
            pull = database.read(info["info"])["pull"] if info else {}
            outcomes = [
                verdict.outcome(r, members[d][0].name, pull.get(d, 0.0)) for d, r in sorted(rows.items())
            ]
            tuner.observe(
                outcomes, {d: p for d, (p, _) in members.items()}, {d: b for d, (_, b) in members.items()}
            )
            run.examples |= {d: float(database.read(r["telemetry"])["examples"]) for d, r in rows.items()}
        return total, same
    finally:
        ledger.close()
