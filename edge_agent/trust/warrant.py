"""Did enough operators of the fleet sign this job, and is this assignment part of it? Asked in the worker, before anything runs.

Only a device whose claim token named the fleet's admins asks: it trusts them, and the coordinator only to pass on what they said.
"""

from pathlib import Path
from typing import Any

import msgspec
import yaml

from rankfleet.federated.errors import Refused
from rankfleet.federated.program.files import write_atomic
from rankfleet.federated.trust.roster import Warrant, check_warrant
from rankfleet.federated.wire.messages import Assignment

from .identity import Identity

SEEN = "roster.version"


def check(who: Identity, home: Path, blobs: dict[str, str], job: Assignment) -> None:
    """Raises Refused with the reason."""
    if not who.operators:
        return
    if "warrant" not in blobs:
        raise Refused("no operator signed this job", "submit it with `coordinator submit --key`")
    try:
        warrant = msgspec.msgpack.decode(Path(blobs["warrant"]).read_bytes(), type=Warrant)
    except (OSError, msgspec.MsgspecError) as error:
        raise Refused(f"the job's warrant is not understood: {error}") from None
    seen = home / SEEN
    oldest = int(seen.read_text()) if seen.exists() else 0
    roster = check_warrant(warrant, who.fleet, who.operators, oldest)
    if roster.version > oldest:
        write_atomic(seen, str(roster.version).encode())
    _same(warrant.text, job)


def _same(text: str, job: Assignment) -> None:
    """The assignment says what the signed job says; arms, views and seeds are the coordinator's to choose."""
    signed: Any = yaml.safe_load(text)
    if not isinstance(signed, dict) or not isinstance(task := signed.get("task"), dict):
        raise Refused("the signed job is not a job")
    training = signed.get("training") or {}
    pairs = {
        "name": (signed.get("name"), job.job.rpartition("-")[0]),
        "model": (signed.get("model"), job.model),
        "rounds": (signed.get("rounds", 10), job.rounds),
        "stack": (list(signed.get("stack", ["sparse"])), list(job.stack)),
        "dataset": (task.get("dataset"), job.task.dataset),
        "kind": (task.get("kind", "text_classification"), job.task.kind),
        "labels": (list(task.get("labels", [])), list(job.task.labels)),
        "template": (task.get("template", ""), job.task.template),
        "samples": (list(task.get("samples", [])), list(job.task.samples)),
        "max_length": (task.get("max_length", 128), job.task.max_length),
    }
    for what, (wanted, told) in pairs.items():
        if wanted != told:
            raise Refused(f"the assignment's {what} is {str(told)[:60]!r}, the operators signed {str(wanted)[:60]!r}")
    if job.purpose == "train" and job.recipe.optimizer != training.get("optimizer", "adamw"):
        raise Refused(f"the assignment's optimizer is {job.recipe.optimizer!r}, the operators signed another")
