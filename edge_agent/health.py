"""What can be wrong with a running agent, and its metrics. Standard library alone: the idle service
carries it."""

import shutil
import time
from typing import TYPE_CHECKING

from rankfleet.federated.program import metrics
from rankfleet.federated.program.health import Condition, Declared, holding

from .trust import certificate

if TYPE_CHECKING:
    from .service import Agent

LOW_MB = 300.0
STUCK_S = 3600.0


def _disk(agent: "Agent") -> str:
    free = shutil.disk_usage(agent.config.home).free / 1e6
    return f"{free:,.0f} MB are free in {agent.config.home}" if free < LOW_MB else ""


def _clock(agent: "Agent") -> str:
    known = certificate.facts(agent.config.home)
    behind = known is not None and time.time() < known.begins
    return f"the clock says {time.strftime('%Y-%m-%d')}, earlier than the certificate" if behind else ""


def _broker(agent: "Agent") -> str:
    return (
        ""
        if agent.bus.connected.is_set()
        else f"no broker: {getattr(agent.bus, 'problem', '') or 'connecting'}"
    )


def _certificate(agent: "Agent") -> str:
    known = certificate.facts(agent.config.home)
    if known is None or time.time() < known.renew_at() + 86_400:
        return ""
    day = time.strftime("%Y-%m-%d", time.localtime(known.ends))
    return f"the certificate ends on {day} and could not be renewed"


def _outbox(agent: "Agent") -> str:
    old = [m for _, m in agent.outbox.due()] if agent.sender.unanswered_s() > STUCK_S else []
    return (
        f"{len(old)} updates wait, and nobody answers for {agent.sender.unanswered_s() / 3600:.0f} h"
        if old
        else ""
    )


def _data(agent: "Agent") -> str:
    missing = [
        n for n, d in agent.config.datasets.items() if not d.path.startswith("hub:") and not _there(d.path)
    ]
    return f"dataset files are not there: {', '.join(missing)}" if missing else ""


def _there(path: str) -> bool:
    from pathlib import Path

    return Path(path).exists()


def _spent(agent: "Agent") -> str:
    today, most = agent.status.counters.today / 1e6, agent.config.allow.mb_per_day
    return f"{today:.0f} MB went over the link today, {most:.0f} are allowed" if today > most else ""


CONDITIONS: list[Declared["Agent"]] = [
    Declared("clock-wrong", "error", _clock, "set the clock; the agent waits for it"),
    Declared("disk-low", "error", _disk, "make room; a round needs the base model and its cache"),
    Declared(
        "broker-away",
        "error",
        _broker,
        "is there a network, and does the coordinator run?",
        depends_on=("clock-wrong",),
    ),
    Declared(
        "certificate-ends",
        "error",
        _certificate,
        "is the coordinator's HTTPS port reachable?",
        depends_on=("clock-wrong",),
    ),
    Declared(
        "updates-wait",
        "warning",
        _outbox,
        "an access rule or a size limit of the broker?",
        depends_on=("broker-away",),
    ),
    Declared("data-missing", "error", _data, "correct `datasets` in the agent's YAML"),
    Declared("traffic-spent", "warning", _spent, "`allow.mb_per_day`; it goes on tomorrow"),
]
"""Causes before what follows from them."""


def conditions(agent: "Agent") -> list[Condition]:
    """What holds now."""
    return holding(CONDITIONS, agent)


TEXTS = {
    "up": ("gauge", "1 while the service runs."),
    "broker_connected": ("gauge", "1 while the broker is reached."),
    "condition": ("gauge", "1 while a declared condition holds."),
    "state": ("gauge", "1 for what the agent is doing."),
    "round": ("gauge", "The round that it works on, or worked on last."),
    "bytes_sent_total": ("counter", "MQTT payload sent since enrolment."),
    "bytes_received_total": ("counter", "MQTT payload received since enrolment."),
    "jobs_done_total": ("counter", "Jobs that ended well here."),
    "updates_waiting": ("gauge", "Finished rounds without a receipt."),
    "workers_killed_total": ("counter", "Training processes that somebody else killed."),
}


def exposition(agent: "Agent") -> str:
    """All metrics."""
    now = {c.code for c in conditions(agent)}
    counters = agent.status.counters
    samples: list[metrics.Sample] = [
        ("up", {}, 1.0),
        ("broker_connected", {}, float(agent.bus.connected.is_set())),
        ("state", {"state": str(agent.status["state"])}, 1.0),
        ("round", {"job": str(agent.status.get("job", ""))}, float(agent.status.get("round", 0))),
        ("bytes_sent_total", {}, float(counters.up)),
        ("bytes_received_total", {}, float(counters.down)),
        ("jobs_done_total", {}, float(counters.jobs_done)),
        ("updates_waiting", {}, float(len(agent.outbox.due()))),
        ("workers_killed_total", {}, float(agent.status.get("worker_killed", 0))),
    ]
    samples += [
        ("condition", {"code": d.code, "severity": d.severity}, float(d.code in now)) for d in CONDITIONS
    ]
    return metrics.text("rankfleet_agent", TEXTS, samples)
