"""Open a round: choose devices and arms, write everything down, then tell them. And the last step: install the result."""

import random
import shutil
from collections import Counter
from collections.abc import Mapping
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
from ..store.versions import Version
from . import closing, verdict

if TYPE_CHECKING:
    from .run import JobRunner

INSTALL_S = 120.0


async def open_round(run: "JobRunner", number: int) -> None:
    """Everything is on disk and in the ledger before the first device hears of it."""
    members = await run.members()
    run.server.fleet = len(members)
    rank = run.server_rank()
    grow_to(run, rank)
    chosen = run.server.select(sorted(members), number) or sorted(members)
    shares = data_shares(run, chosen)
    choices = run.tuner.choose(number, [(d, members[d][0], shares[d]) for d in chosen])
    expected = slowest(run, choices, {d: members[d][0] for d in chosen}, number)
    inline = len(chosen) <= run.limits.outstanding_chunks
    made = {d: run.planner.assign(run.version, number, d, choices[d], run.server, inline) for d in chosen}
    run.registry.save_views(run.version)
    write_atomic(run.registry.opened(number), freeze({**run.state(), "fleet": run.server.fleet, "rank": rank}))
    tell(run, number, made, {d: c.arm for d, c in choices.items()}, {d: c.why for d, c in choices.items()}, expected)


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


def slowest(run: "JobRunner", choices: Mapping[str, Choice], profiles: Mapping[str, DeviceProfile], number: int) -> float:
    """Predicted seconds of the slowest device."""
    times = [a.seconds for d, c in choices.items() for a in run.tuner.feasible(d, profiles[d], number) if a.arm == c.arm]
    return max(times, default=60.0)


def reopen(run: "JobRunner", number: int) -> None:
    """After a restart: the state of the open round, and the same assignments again."""
    saved = thaw(run.registry.opened(number).read_bytes())
    run.restore(saved)
    run.server.fleet = int(saved["fleet"])
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


async def install_everywhere(run: "JobRunner") -> None:
    """Give the last version to every device that took part, and let it be measured there; to the canaries first, if the job says so."""
    number = run.plan.spec.rounds
    if run.ledger.round(run.job, number) is None:
        install(run, run.version, number, canaries(run))
    else:
        repeat(run, number)
    await installed(run, number)
    if rest := [d for d in took_part(run) if not run.ledger.answer(run.job, number, d)]:
        metrics = verdict.of_version(run.ledger.answers(run.job, number))
        if closing.is_good(run, run.version.number, metrics):
            install(run, run.version, number, rest, more=True)
            await installed(run, number)
        else:
            run.ledger.tell(run.job, "", f"version {run.version.number} is worse on the canaries; {len(rest)} devices keep what they have")
    rows = run.ledger.answers(run.job, number)
    with run.ledger.write() as tx:
        closing.judge(run, tx, run.version.number, verdict.of_version(rows))
        closing.mark_closed(run, tx, number, rows)
    if closing.is_latest_good(run):
        shutil.rmtree(run.home / "updates" / run.job, ignore_errors=True)  # no version can need them, and they are devices' data


async def installed(run: "JobRunner", number: int) -> None:
    """Until everybody has answered, or `INSTALL_S` has passed."""
    end = run.ticks() + INSTALL_S
    run.nudges.start(run.ticks())
    while run.ticks() < end and run.pending.out(run.job, number):
        run.nudges.send(run, number)
        await run.change(min(1.0, run.nudges.patience_s))


def took_part(run: "JobRunner") -> dict[str, Arm]:
    """Every device that ever took part and is still one of ours → its last arm."""
    rows = [r for r in run.ledger.answers(run.job, None, "device", "round", "arm") if r["round"] < run.plan.spec.rounds]
    return {r["device"]: msgspec.convert(database.read(r["arm"]), Arm) for r in rows if run.fleet.has(r["device"])}


def canaries(run: "JobRunner") -> list[str]:
    """Who gets the final version first: all, unless the job asks for a share of them."""
    devices, share = sorted(took_part(run)), run.plan.spec.canary
    if not share or len(devices) < 2:
        return devices
    return sorted(random.Random(f"{run.plan.spec.seed} canary").sample(devices, max(1, round(share * len(devices)))))


def install(run: "JobRunner", version: Version, number: int, devices: list[str], more: bool = False) -> None:
    """Send a version to devices as round `number`, each in the shape of its last arm; `more`: the round is there already."""
    arms = {d: arm for d, arm in took_part(run).items() if d in set(devices)}
    made = {d: run.planner.install(version, d, arm, run.server) for d, arm in sorted(arms.items())}
    tell(run, number, made, arms, {}, more=more)
