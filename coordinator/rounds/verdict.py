"""What devices report, summed: held-out loss of a version, whether it is good, and what an arm brought."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import msgspec

from rankfleet.bandit.arms import Arm
from rankfleet.bandit.policy import Outcome
from rankfleet.federated.wire.states import ARRIVED, USABLE

from ..store.database import Row, read
from ..store.ledger import Transaction

if TYPE_CHECKING:
    from .run import JobRunner


def of_version(rows: Iterable[Row]) -> dict[str, Any]:
    """Mean held-out loss, its standard error and accuracy, over every device that measured the version it
    was given."""
    total = {"loss": 0.0, "square": 0.0, "correct": 0.0, "count": 0.0}
    by_device: dict[str, float] = {}
    for row in rows:
        held = read(row["telemetry"]).get("held")
        if not isinstance(held, dict) or not held.get("count"):
            continue
        for key in total:
            total[key] += float(held[key])
        by_device[row["device"]] = round(float(held["correct"]) / float(held["count"]), 4)
    n = total["count"]
    if not n:
        return {}
    mean = total["loss"] / n
    variance = max(0.0, total["square"] / n - mean**2)
    return {
        "loss": mean,
        "se": math.sqrt(variance / n),
        "accuracy": total["correct"] / n,
        "count": n,
        "devices": by_device,
    }


def good_enough(now: Mapping[str, Any], last: Mapping[str, Any]) -> bool:
    """Not worse than the last good version by two standard errors. What nobody measured is not good."""
    if not now:
        return False
    if not last:
        return True
    return bool(now["loss"] <= last["loss"] + 2 * math.hypot(now["se"], last["se"]))


def outcome(
    row: Row, kind: str, norm_share: float = 0.0, looks: Mapping[str, Mapping[str, Any]] | None = None
) -> Outcome:
    """What came of an arm, for the tuner."""
    told = read(row["telemetry"])
    failed = "" if row["state"] in ARRIVED else str(told.get("code") or "crash")
    return Outcome(
        row["device"],
        kind,
        msgspec.convert(read(row["arm"]), Arm),
        _loss(told, "loss_before"),
        _loss(told, "loss_after"),
        float(row["seconds"]),
        norm_share,
        failed,
        looks or {},
    )


def _loss(told: Mapping[str, Any], name: str) -> float | None:
    """A reported loss; NaN where it was no number, None where the device does not tell it."""
    if name not in told:
        return None
    return math.nan if told[name] is None else float(told[name])


def summary(rows: Sequence[Row]) -> dict[str, Any]:
    """One line per round for tables and plots."""
    told = {r["device"]: read(r["telemetry"]) for r in rows}
    losses = [t["loss_after"] for t in told.values() if t.get("loss_after") is not None]
    return {
        "loss": sum(losses) / len(losses) if losses else None,
        "arrived": sum(r["state"] in USABLE for r in rows),
        "invited": len(rows),
    }


def is_good(run: "JobRunner", number: int, metrics: dict[str, Any]) -> bool:
    """Is what was measured of a version not worse than the last good one before it?"""
    older = [r for r in run.ledger.versions(run.job, "good") if r["number"] < number]
    return good_enough(metrics, read(older[-1]["metrics"]) if older else {})


def is_latest_good(run: "JobRunner") -> bool:
    """Did devices find the newest version good?"""
    row = run.ledger.version(run.job, run.version.number)
    return row is not None and row["state"] == "good"


def judge(run: "JobRunner", tx: Transaction, number: int, metrics: dict[str, Any]) -> None:
    """What devices measured of this version on their own held-out tenth decides whether it is `good`."""
    tx.judge_version(run.job, number, "good" if is_good(run, number, metrics) else "candidate", metrics)


def mark_closed(
    run: "JobRunner",
    tx: Transaction,
    number: int,
    rows: Sequence[Row],
    pull: Mapping[str, float] | None = None,
) -> None:
    """The round's row."""
    tx.close_round(run.job, number, run.clock(), {**summary(rows), "pull": dict(pull or {})})
