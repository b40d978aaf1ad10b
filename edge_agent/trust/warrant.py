"""Did enough operators of the fleet sign this job, and is this assignment part of it? Asked in the worker,
before anything runs.

Only a device whose claim token named the fleet's admins asks: it trusts them, and the coordinator only to
pass on what they said.
"""

from pathlib import Path
from typing import Any

import msgspec

from rankfleet.federated.contract.catalogue import build_stack
from rankfleet.federated.errors import ConfigError, Refused
from rankfleet.federated.program.files import write_atomic
from rankfleet.federated.program.loader import loads
from rankfleet.federated.trust.roster import Warrant, check_warrant
from rankfleet.federated.trust.signed_job import SignedJob, SignedTask
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
    try:
        signed = loads(text, SignedJob, "the signed job")
    except ConfigError as error:
        raise Refused(str(error)) from None
    pairs = {
        "name": (signed.name, job.job.rpartition("-")[0]),
        "model": (signed.model, job.model),
        "rounds": (signed.rounds, job.rounds),
        "stack": (list(signed.stack), list(job.stack)),
    }
    for field in msgspec.structs.fields(SignedTask):
        pairs[f"task.{field.name}"] = (
            _plain(getattr(signed.task, field.name)),
            _plain(getattr(job.task, field.name)),
        )
    if job.purpose == "train":
        usual = "sgd" if any(m.plain for m in build_stack(list(signed.stack)).values()) else "adamw"
        pairs["optimizer"] = signed.training.optimizer or usual, job.recipe.optimizer
    for what, (wanted, asked) in pairs.items():
        if wanted != asked:
            raise Refused(
                f"the assignment's {what} is {str(asked)[:60]!r}, the operators signed {str(wanted)[:60]!r}"
            )


def _plain(value: Any) -> Any:
    """Lists and tuples are the same on the wire."""
    return list(value) if isinstance(value, tuple) else value
