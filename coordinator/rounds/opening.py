"""Open a round: choose devices and arms, write everything down, then tell them. And the last step: install
the result."""

from collections import Counter
from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING

import msgspec

from rankfleet.bandit.arms import Arm
from rankfleet.bandit.policy import Choice
from rankfleet.federated.program.files import write_atomic
from rankfleet.federated.wire.frame import freeze, thaw
from rankfleet.federated.wire.messages import Assignment, body, read_assignment
from rankfleet.profiles.device import DeviceProfile

from ..planning.views import grow
from ..store import database, tables

if TYPE_CHECKING:
    from .run import JobRunner, Members


async def open_round(run: "JobRunner", number: int) -> None:
    """Everything is on disk and in the ledger before the first device hears of it."""
    members, chosen = await invited(run, number)
    rank = run.server_rank()
    grow_to(run, rank)
    shares = data_shares(run, chosen)
    choices = run.tuner.choose(number, [(d, members[d][0], shares[d]) for d in chosen])
    expected = slowest(run, choices, {d: members[d][0] for d in chosen}, number)
    inline = len(chosen) <= run.limits.outstanding_chunks
    made = {d: run.planner.assign(run.version, number, d, choices[d], run.server, inline) for d in chosen}
    run.registry.save_views(run.version)
    write_atomic(
        run.registry.opened(number), freeze({**run.state(), "fleet": run.server.enrolled, "rank": rank})
    )
    tell(
        run,
        number,
        made,
        {d: c.arm for d, c in choices.items()},
        {d: c.why for d, c in choices.items()},
        expected,
    )


LOOK_S = 5.0
"""Between two questions to methods that select nobody."""


async def invited(run: "JobRunner", number: int) -> "tuple[Members, list[str]]":
    """The eligible devices, and those of them that methods select; waits as long as they select nobody."""
    told = False
    while True:
        members = await run.members()
        run.server.enrolled = len(members)
        if number % len(run.plan.stack.legs):
            return members, answered(run, number - 1, members)
        if chosen := run.server.select(run.described(members), number):
            return members, chosen
        if not told:
            text = f"round {number} waits: `{run.server.emptied}` selects none of {len(members)} devices"
            run.ledger.tell(run.job, "", text)
            told = True
        await run.change(LOOK_S)


def answered(run: "JobRunner", number: int, members: Collection[str]) -> list[str]:
    """Who goes on to a round's next leg: devices that answered the leg before."""
    rows = run.ledger.answers(run.job, number, "device", state="counted")
    return sorted({r["device"] for r in rows} & set(members)) or sorted(members)


def tell(
    run: "JobRunner",
    number: int,
    made: Mapping[str, Assignment],
    arms: Mapping[str, Arm],
    why: Mapping[str, str],
    expected_s: float = 0.0,
    more: bool = False,
) -> None:
    """Round and assignments into the ledger in one transaction, then onto the bus."""
    now = run.clock()
    with run.ledger.write() as tx:
        if not more:
            tx.open_round(run.job, number, now, expected_s)
        rows = [
            {
                "job": run.job, "round": number, "device": d, "state": "assigned", "body": body(a),
                "arm": database.text(msgspec.to_builtins(arms[d])), "why": why.get(d, ""), "sent_at": now,
            }
            for d, a in made.items()
        ]  # fmt: skip
        tx.insert(tables.assignments, rows)
    for device, assignment in made.items():
        run.pending.add(run.job, number, device, 0.0, assignment.purpose)
        run.note_blobs(number, assignment)
    for blob, count in Counter(b.digest for a in made.values() for b in a.blobs.values()).items():
        run.blobs.expect(blob, count)
    for device, assignment in made.items():
        run.fleet.publish(device, assignment)


def grow_to(run: "JobRunner", rank: int) -> None:
    """In product space the server's rank follows the largest that a device can train; it never shrinks."""
    if run.plan.stack.space == "product":
        pairs = run.version.pairs
        run.version.pairs = {m: grow(p, min(rank, p.B.shape[0], p.A.shape[1])) for m, p in pairs.items()}


def data_shares(run: "JobRunner", devices: list[str]) -> dict[str, float]:
    """Shares of the data, as far as earlier rounds told; equal before."""
    known = {d: n for d, n in run.examples.items() if n}
    middle = sorted(known.values())[len(known) // 2] if known else 1.0
    total = sum(known.get(d, middle) for d in devices)
    return {d: known.get(d, middle) / total for d in devices}


def slowest(
    run: "JobRunner", choices: Mapping[str, Choice], profiles: Mapping[str, DeviceProfile], number: int
) -> float:
    """Predicted seconds of the slowest device."""
    times = [
        a.seconds
        for d, c in choices.items()
        for a in run.tuner.feasible(d, profiles[d], number)
        if a.arm == c.arm
    ]
    return max(times, default=60.0)


def reopen(run: "JobRunner", number: int) -> None:
    """After a restart: the state of the open round, and the same assignments again."""
    saved = thaw(run.registry.opened(number).read_bytes())
    run.restore(saved)
    run.server.enrolled = int(saved["fleet"])
    grow_to(run, int(saved["rank"]))
    repeat(run, number)


def repeat(run: "JobRunner", number: int) -> None:
    """Offer the blobs of a round again, and send its open assignments again."""
    for row in run.ledger.answers(run.job, number):
        assignment = read_assignment(row["body"])
        for blob in assignment.blobs.values():
            run.blobs.know(blob)
        run.note_blobs(number, assignment)
        if row["state"] == "assigned":
            run.pending.add(run.job, number, row["device"], run.clock() - row["sent_at"], assignment.purpose)
            run.fleet.publish(row["device"], assignment)
