"""The last step of a job: its result is put in place on every device that took part, and measured there."""

import random
import shutil
from typing import TYPE_CHECKING

import msgspec

from rankfleet.bandit.arms import Arm

from ..store import database
from ..store.versions import Version
from . import verdict
from .opening import repeat, tell

if TYPE_CHECKING:
    from .run import JobRunner

INSTALL_S = 120.0


async def install_everywhere(run: "JobRunner") -> None:
    """Give the last version to every device that took part, and let it be measured there; to the canaries
    first, if the job says so."""
    number = run.rounds
    if run.ledger.round(run.job, number) is None:
        install(run, run.version, number, canaries(run))
    else:
        repeat(run, number)
    await installed(run, number)
    if rest := [d for d in took_part(run) if not run.ledger.answer(run.job, number, d)]:
        metrics = verdict.of_version(run.ledger.answers(run.job, number))
        if verdict.is_good(run, run.version.number, metrics):
            install(run, run.version, number, rest, more=True)
            await installed(run, number)
        else:
            run.ledger.tell(
                run.job,
                "",
                f"version {run.version.number} is worse on the canaries; {len(rest)} devices keep what they "
                "have",
            )
    rows = run.ledger.answers(run.job, number)
    with run.ledger.write() as tx:
        verdict.judge(run, tx, run.version.number, verdict.of_version(rows))
        verdict.mark_closed(run, tx, number, rows)
    if verdict.is_latest_good(run):
        shutil.rmtree(
            run.home / "updates" / run.job, ignore_errors=True
        )  # no version can need them, and they are devices' data


async def installed(run: "JobRunner", number: int) -> None:
    """Until everybody has answered, or `INSTALL_S` has passed."""
    end = run.ticks() + INSTALL_S
    run.nudges.start(run.ticks())
    while run.ticks() < end and run.pending.out(run.job, number):
        run.nudges.send(run, number)
        await run.change(min(1.0, run.nudges.patience_s))


def took_part(run: "JobRunner") -> dict[str, Arm]:
    """Every device that ever took part and is still one of ours → its last arm."""
    rows = [r for r in run.ledger.answers(run.job, None, "device", "round", "arm") if r["round"] < run.rounds]
    return {
        r["device"]: msgspec.convert(database.read(r["arm"]), Arm) for r in rows if run.fleet.has(r["device"])
    }


def canaries(run: "JobRunner") -> list[str]:
    """Who gets the final version first: all, unless the job asks for a share of them."""
    devices, share = sorted(took_part(run)), run.plan.spec.canary
    if not share or len(devices) < 2:
        return devices
    return sorted(
        random.Random(f"{run.plan.spec.seed} canary").sample(devices, max(1, round(share * len(devices))))
    )


def install(run: "JobRunner", version: Version, number: int, devices: list[str], more: bool = False) -> None:
    """Send a version to devices as round `number`, each in the shape of its last arm; `more`: the round is
    there already."""
    arms = {d: arm for d, arm in took_part(run).items() if d in set(devices)}
    made = {d: run.planner.install(version, d, arm, run.server) for d, arm in sorted(arms.items())}
    tell(run, number, made, arms, {}, more=more)
