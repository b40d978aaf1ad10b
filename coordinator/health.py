"""What can be wrong with a running coordinator, and its metrics."""

import shutil
import time
from typing import TYPE_CHECKING, Any

from rankfleet.federated.program import metrics
from rankfleet.federated.program.health import Condition, Declared, holding
from rankfleet.federated.wire.states import HELD

from .store import database

if TYPE_CHECKING:
    from .service import Service

LOW_MB = 2000
SILENT_S = 3 * 86_400.0
SOON_S = 7 * 86_400.0


def _free_mb(service: "Service") -> float:
    return shutil.disk_usage(service.config.home).free / 1e6


def _disk(service: "Service", below: float, above: float = 0.0) -> str:
    free = _free_mb(service)
    return f"{free:,.0f} MB are free in {service.config.home}" if above <= free < below else ""


def _broker(service: "Service") -> str:
    return (
        ""
        if service.bus.connected.is_set()
        else f"no broker: {getattr(service.bus, 'problem', '') or 'connecting'}"
    )


def _suspended(service: "Service") -> str:
    names = [d["device"] for d in service.devices.table() if d["state"] == "suspended"]
    return f"suspended: {', '.join(names)}" if names else ""


def _silent(service: "Service") -> str:
    now = time.time()
    names = [
        d["device"]
        for d in service.devices.table()
        if d["state"] == "enrolled" and d["seen"] and now - d["seen"] > SILENT_S
    ]
    return f"not heard of for three days: {', '.join(names)}" if names else ""


def _certificates(service: "Service") -> str:
    now = time.time()
    names = [
        d
        for d, ends in service.enrolment.ends().items()
        if service.devices.enrolled(d) and ends - now < SOON_S
    ]
    return f"end within a week and are not renewed: {', '.join(names)}" if names else ""


def _held(service: "Service") -> str:
    names = [r["id"] for r in service.ledger.jobs(HELD)]
    return f"jobs wait for operators' signatures: {', '.join(names)}" if names else ""


CONDITIONS: list[Declared["Service"]] = [
    Declared(
        "disk-full",
        "error",
        lambda s: _disk(s, s.config.limits.keep_free_mb),
        "make room; updates wait on the devices",
    ),
    Declared(
        "disk-low",
        "warning",
        lambda s: _disk(s, LOW_MB, s.config.limits.keep_free_mb),
        "make room before it is full",
    ),
    Declared("broker-away", "error", _broker, "is the broker running, and its certificate valid?"),
    Declared(
        "job-waits", "error", lambda s: s.jobs.problem, "the text says for what", depends_on=("disk-full",)
    ),
    Declared(
        "device-suspended",
        "warning",
        _suspended,
        "coordinator devices: the note says why; coordinator devices resume NAME",
    ),
    Declared(
        "device-silent", "warning", _silent, "edge-agent doctor on the device", depends_on=("broker-away",)
    ),
    Declared(
        "certificate-ends",
        "warning",
        _certificates,
        "can the device reach the HTTPS port?",
        depends_on=("broker-away",),
    ),
    Declared("job-held", "warning", _held, "coordinator approve JOB --key FILE"),
]
"""Causes before what follows from them."""


def conditions(service: "Service") -> list[Condition]:
    """What holds now."""
    return holding(CONDITIONS, service)


TEXTS = {
    "up": ("gauge", "1 while the service runs."),
    "broker_connected": ("gauge", "1 while the broker is reached."),
    "condition": ("gauge", "1 while a declared condition holds."),
    "devices": ("gauge", "Devices by state."),
    "jobs": ("gauge", "Jobs by state."),
    "round": ("gauge", "The newest round of the running job."),
    "round_seconds": ("gauge", "How long the last closed round of the running job took."),
    "heldout_loss": (
        "gauge",
        "Loss of the newest measured version of the running job on devices' held-out examples.",
    ),
    "assignments": ("gauge", "Assignments of the running job by state."),
    "messages_dropped_total": ("counter", "Messages that were refused, by reason."),
    "bytes_received_total": ("counter", "Payload that devices sent, as far as it is in the ledger."),
    "disk_free_bytes": ("gauge", "Free in data_dir."),
}


def _job(service: "Service") -> list[metrics.Sample]:
    runner = service.jobs.runner
    if runner is None:
        return []
    of = {"job": runner.job}
    rounds = service.ledger.rounds(runner.job)
    found: list[metrics.Sample] = [("round", of, float(rounds[-1]["number"]))] if rounds else []
    if closed := [r for r in rounds if r["closed"]]:
        found.append(("round_seconds", of, float(closed[-1]["closed"] - closed[-1]["opened"])))
    states: dict[str, int] = {}
    for row in service.ledger.answers(runner.job, None, "state"):
        states[row["state"]] = states.get(row["state"], 0) + 1
    found += [("assignments", {**of, "state": s}, n) for s, n in states.items()]
    measured = [m for r in service.ledger.versions(runner.job) if (m := database.read(r["metrics"]))]
    return [*found, ("heldout_loss", of, float(measured[-1]["loss"]))] if measured else found


def exposition(service: "Service") -> str:
    """All metrics."""
    now = {c.code for c in conditions(service)}
    table = service.devices.table()
    samples: list[metrics.Sample] = [
        ("up", {}, 1.0),
        ("broker_connected", {}, float(service.bus.connected.is_set())),
        ("disk_free_bytes", {}, _free_mb(service) * 1e6),
        ("bytes_received_total", {}, float(sum(d["bytes_in"] for d in table))),
    ]
    samples += [
        ("condition", {"code": d.code, "severity": d.severity}, float(d.code in now)) for d in CONDITIONS
    ]
    samples += _counted("devices", [d["state"] for d in table])
    samples += _counted("jobs", [r["state"] for r in service.ledger.jobs()])
    for reason, count in (
        ("refused", service.dropped), ("repeated", service.repeated), ("not_read", service.admission.dropped),
        ("corrupt_piece", service.uploads.corrupt), ("certificate", service.enrolment.refused),
    ):  # fmt: skip
        samples.append(("messages_dropped_total", {"reason": reason}, float(count)))
    return metrics.text("rankfleet", TEXTS, samples + _job(service))


def _counted(name: str, states: list[Any]) -> list[metrics.Sample]:
    return [(name, {"state": s}, float(states.count(s))) for s in sorted(set(states))]
