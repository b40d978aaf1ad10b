"""Close a round: lift the updates, admit, reduce, step; save the next version; settle the ledger in one
transaction.

The set of updates is written down first, so that a round whose closing was cut off is closed again from
the same ones. The version's row and the states of its updates change together: an update is counted once,
whatever is killed when.
"""

import asyncio
import math
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from rankfleet.coordinator.aggregate.kept import Keeper
from rankfleet.federated.contract.tensors import Tensors
from rankfleet.federated.contract.update import Update
from rankfleet.federated.errors import ConfigError, Refused, WireError
from rankfleet.federated.wire.messages import read_assignment

from ..aggregate import combine
from ..aggregate.lifting import IMPORTANCE, Lifter
from ..planning import importance
from ..store import database
from ..store.database import Row
from ..store.ledger import Transaction
from ..store.versions import Version
from . import claimed_examples, usual_norms, verdict

if TYPE_CHECKING:
    from .run import JobRunner

LATE_DISCOUNT = 0.5
Folding = list[list[Any]]
"""[device, round] of every update that goes into a version."""


async def close(run: "JobRunner", number: int) -> None:
    """Make the version after round `number`, or make it again."""
    row = run.ledger.round(run.job, number)
    assert row is not None
    folding: Folding = database.read(row["folding"])
    if row["state"] != "closing":
        folding = [[r["device"], r["round"]] for r in foldable(run, number)]
        run.ledger.begin_closing(run.job, number, folding)
    version, pull = await asyncio.to_thread(make, run, number, folding)
    rows = run.ledger.answers(run.job, number)
    for row in rows:
        if examples := database.read(row["telemetry"]).get("examples"):
            run.examples[row["device"]] = float(examples)
    with run.ledger.write() as tx:
        verdict.judge(run, tx, number, verdict.of_version(rows))
        run.record(tx, version)
        verdict.mark_closed(run, tx, number, rows, pull)
        settle(run, tx, number, folding)
    run.pending.close(run.job, number)
    run.adopt(version)
    tidy(run, version.number)


def foldable(run: "JobRunner", number: int) -> list[Row]:
    """This round's updates, and late ones whose base version is still known."""
    fold = run.plan.spec.late == "fold"
    rows = run.ledger.answers_since(run.job, number - run.plan.spec.staleness, state="received")
    return [r for r in rows if r["round"] == number or (fold and r["round"] < number)]


def make(run: "JobRunner", number: int, folding: Folding) -> tuple[Version, dict[str, float]]:
    """The next version, from the ledger and files alone; and each device's share of the updates' norms."""
    keeper = Keeper(pinned_mb=math.inf) if run.plan.stack.needs_all else Keeper()
    lifter = Lifter(run.server, run.blobs, number, keeper)
    of_rounds = {of for _, of in folding}
    rows = {(r["device"], r["round"]): r for of in of_rounds for r in run.ledger.answers(run.job, of)}
    told = {
        d: float(n)
        for (d, _), r in rows.items()
        if isinstance(n := database.read(r["telemetry"]).get("examples"), int | float) and n > 0
    }
    allowed = claimed_examples.bounds(told, run.examples, run.plan.spec.most_weight)
    for device, text in claimed_examples.notes(told, run.examples, allowed):
        run.ledger.tell(run.job, device, f"round {number}: {text}")
    norms: dict[str, float] = {}
    scores: list[tuple[float, dict[str, Any]]] = []
    looks: dict[str, Mapping[str, Tensors]] = {}
    usual = usual_norms.Usual(run.norms, run.plan.spec.norm_factor)

    def liftable() -> Iterator[tuple[Row, Update]]:
        for device, of in sorted(folding):
            if (row := rows.get((device, of))) is not None and (
                u := lifted(run, lifter, row, allowed)
            ) is not None:
                yield row, u

    if usual.unknown and len(folding) >= usual_norms.ENOUGH:
        usual.learn(u for _, u in liftable())  # decoded twice, in a job's first round alone

    def updates() -> Iterator[Update]:
        for row, u in liftable():
            norm = u.norm()
            if reason := usual.objects(u, norm):
                put_aside(run, row, reason)
                continue
            norms[u.device] = norm
            scores.append((u.weight, u.extra.pop(IMPORTANCE, {})))
            looks[u.device] = u.extra
            run.planner.tell(u.device, scores[-1][1])
            yield u

    version, used = combine.next_version(run.server, run.version, updates(), len(folding), number)
    left_out(run, number)
    if not used and not run.server.left_out:
        raise ConfigError(f"round {number}: no update could be used; `coordinator rounds {run.job}` says why")
    if not used:
        run.ledger.tell(
            run.job,
            "",
            f"round {number}: no update was admitted; version {version.number} is what version {number} was",
        )
    run.norms = usual.remembered()
    if run.planner.prunes and any(told for _, told in scores):
        run.planner.rank(importance.agreed(run.plan.card, run.planner.scores, scores))
    run.planner.carry_views(run.version, version)
    total = sum(norms.values()) or 1.0
    pull = {d: n / total for d, n in sorted(norms.items())}
    observe(run, [r for (_, of), r in sorted(rows.items()) if of == number], pull, looks)
    return version, pull


def left_out(run: "JobRunner", number: int) -> None:
    """Updates that methods did not admit are dropped, each with the name of the method."""
    for (device, age), method in sorted(run.server.left_out.items()):
        run.ledger.drop(run.job, number - age, device, f"`{method}` did not admit it")
        run.ledger.tell(
            run.job, device, f"round {number}: `{method}` did not admit its update of round {number - age}"
        )


def lifted(run: "JobRunner", lifter: Lifter, row: Row, allowed: Mapping[str, float]) -> Update | None:
    """One update in canonical coordinates; None for one that cannot be used, which is put aside with the
    reason."""
    if row["state"] == "refused":
        return None
    device, of = row["device"], row["round"]
    try:
        made = lifter.lift(run.update_path(of, device), read_assignment(row["body"]), device)
        report = {**made.report, "seconds": float(row["seconds"])}
        made = replace(made, weight=min(made.weight, allowed.get(device, made.weight)), report=report)
        importance.agreed(run.plan.card, run.planner.scores, [(1.0, made.extra[IMPORTANCE])])
    except (WireError, OSError, Refused) as error:
        put_aside(run, row, str(error))
        return None
    if made.age and not run.plan.stack.using("ready"):
        made = replace(made, weight=made.weight * LATE_DISCOUNT**made.age)
    return made


def put_aside(run: "JobRunner", row: Row, reason: str) -> None:
    """An update that is not used, and stays on disk for whoever looks into it."""
    run.ledger.refuse(run.job, row["round"], row["device"], reason)
    run.ledger.tell(run.job, row["device"], f"its update of round {row['round']} was put aside: {reason}")


def observe(
    run: "JobRunner",
    rows: Sequence[Row],
    pull: Mapping[str, float],
    looks: Mapping[str, Mapping[str, Tensors]],
) -> None:
    """What came of the arms, for the tuner; with what methods' `arrived` and `trained` said."""
    eligible = run.fleet.eligible(run.plan)
    known, bits = {d: p for d, (p, _) in eligible.items()}, {d: b for d, (_, b) in eligible.items()}
    outcomes = [
        verdict.outcome(r, known[r["device"]].name, pull.get(r["device"], 0.0), looks.get(r["device"], {}))
        for r in rows
        if r["device"] in known and r["state"] != "assigned"
    ]
    run.tuner.observe(outcomes, known, bits)


def settle(run: "JobRunner", tx: Transaction, number: int, folding: Folding) -> None:
    """Updates that went in are counted; whoever has not answered is late; what is too old for any version
    is said to be."""
    oldest = number - run.plan.spec.staleness if run.plan.spec.late == "fold" else number
    tx.settle(run.job, number, folding, oldest)


def tidy(run: "JobRunner", number: int) -> None:
    """Raw updates and views that no late update can need any more go; digests stay in the ledger.

    Raw updates stay until devices found a version good that they went into: until then somebody may have
    to look into them.
    """
    oldest = number - run.plan.spec.staleness
    good = max((r["number"] for r in run.ledger.versions(run.job, "good")), default=0)
    run.registry.forget_before(oldest, {run.planner.snapshot_number(number), 0})
    for path in (run.home / "updates" / run.job).glob("r??????"):
        if int(path.name[1:]) < min(oldest, good):
            shutil.rmtree(path, ignore_errors=True)
    run.blobs.forget(run.blobs_in_use(oldest))
