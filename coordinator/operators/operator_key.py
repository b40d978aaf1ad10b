"""An operator's private key, on the operator's own machine: it signs requests and jobs, and never goes to
the coordinator."""

import os
import time
from pathlib import Path
from typing import Annotated

import msgspec

from rankfleet.federated.errors import ConfigError
from rankfleet.federated.program.files import write_atomic
from rankfleet.federated.program.loader import load
from rankfleet.federated.trust.roster import (
    Operator,
    Role,
    Roster,
    SignedRoster,
    decode_key,
    encode_key,
    job_bytes,
    pack,
    request_bytes,
    roster_bytes,
)

HEAD = "rankfleet operator's key: "


class Person(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """An operator in the roster's YAML: what he may do, and the line that `operators keygen` printed."""

    role: Role
    key: str


class RosterFile(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The roster's YAML; `approvals`: how many must sign a job."""

    operators: dict[str, Person]
    approvals: Annotated[int, msgspec.Meta(ge=1)] = 1


def generate(path: Path) -> str:
    """A new key in `path`, readable by its owner alone; returns its public half. Raises ConfigError where
    the file is there."""
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    if path.exists():
        raise ConfigError(f"{path} exists", "keys are not replaced; take another name")
    private = Ed25519PrivateKey.generate()
    write_atomic(path, (HEAD + encode_key(private.private_bytes_raw()) + "\n").encode(), 0o600)
    return encode_key(private.public_key().public_bytes_raw())


class OperatorKey:
    """Signs for one operator."""

    def __init__(self, path: Path) -> None:
        from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

        try:
            text = path.read_text(encoding="ascii").strip()
        except (OSError, ValueError) as error:
            raise ConfigError(f"{path}: {error}", "coordinator operators keygen --to FILE") from None
        if os.name == "posix" and path.stat().st_mode & 0o077:
            raise ConfigError(f"{path} can be read by others", f"chmod 600 {path}")
        self._private = Ed25519PrivateKey.from_private_bytes(decode_key(text.removeprefix(HEAD), str(path)))
        self.public = self._private.public_key().public_bytes_raw()

    def request(self, fleet: str, method: str, path: str, body: bytes) -> dict[str, str]:
        """Headers that say who asks."""
        at = f"{time.time():.6f}"
        signature = self._private.sign(request_bytes(fleet, method, path, body, at))
        return {"X-Operator": encode_key(self.public), "X-At": at, "X-Signature": signature.hex()}

    def job(self, fleet: str, text: str) -> str:
        """The signature over a job, in hexadecimal digits."""
        return self._private.sign(job_bytes(fleet, text)).hex()

    def roster(self, path: Path, fleet: str, version: int) -> bytes:
        """The roster in a YAML file (`approvals: 2`, `operators: {NAME: {role: admin, key: …}}`), signed."""
        file = load(path, RosterFile)
        who = file.operators.items()
        people = {n: Operator(p.role, decode_key(p.key, f"operator `{n}`")) for n, p in who}
        data = pack(Roster(fleet, version, people, file.approvals))
        return pack(SignedRoster(data, self.public, self._private.sign(roster_bytes(data))))
