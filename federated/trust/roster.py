"""Who may order what: a roster of operators' keys that an admin signed, and warrants that operators sign
for jobs.

The coordinator passes both on and can make neither: a device that knows the fleet's admins (from its claim
token) carries out only what enough operators signed, whoever runs the coordinator.
"""

import base64
import hashlib
from collections.abc import Iterable
from typing import Any, Literal

import msgspec

from ..errors import ConfigError, Refused

Role = Literal["viewer", "operator", "admin"]
RANKS = {"viewer": 0, "operator": 1, "admin": 2}


class Operator(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A person or a program; `key` is the public half, 32 bytes."""

    role: Role
    key: bytes


class Roster(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """All operators by name. `approvals`: how many must sign a job. `version` only rises."""

    fleet: str
    version: int
    operators: dict[str, Operator]
    approvals: int = 1

    def named(self, key: bytes) -> str:
        """Whose key it is; empty where nobody's."""
        return next((n for n, o in self.operators.items() if o.key == key), "")

    def admins(self) -> list[bytes]:
        """Their keys."""
        return [o.key for o in self.operators.values() if o.role == "admin"]


class SignedRoster(msgspec.Struct, frozen=True, array_like=True):
    """A roster as it travels: msgpack bytes, the key of the admin who signed them, 64 bytes of signature."""

    data: bytes
    key: bytes
    signature: bytes


class Warrant(msgspec.Struct, frozen=True, array_like=True):
    """A job as its operators signed it: the YAML text, (key, signature) of each, and the roster that they
    stand in."""

    text: str
    signatures: list[tuple[bytes, bytes]]
    roster: SignedRoster


def job_bytes(fleet: str, text: str) -> bytes:
    """What an operator signs for a job."""
    return f"rankfleet job\n{fleet}\n{hashlib.sha256(text.encode()).hexdigest()}\n".encode()


def request_bytes(fleet: str, method: str, path: str, body: bytes, at: str) -> bytes:
    """What an operator signs for a request to the coordinator's API."""
    return f"rankfleet request\n{fleet}\n{method} {path}\n{hashlib.sha256(body).hexdigest()}\n{at}\n".encode()


def roster_bytes(data: bytes) -> bytes:
    """What an admin signs for a roster."""
    return b"rankfleet roster\n" + data


def signed_by(key: bytes, signature: bytes, data: bytes) -> bool:
    """Is `signature` over `data` of the holder of `key`?"""
    from cryptography.exceptions import InvalidSignature
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

    try:
        Ed25519PublicKey.from_public_bytes(key).verify(signature, data)
    except (InvalidSignature, ValueError):
        return False
    return True


def read_roster(signed: SignedRoster, fleet: str, admins: Iterable[bytes]) -> Roster:
    """The roster, if one of `admins` signed it for this fleet. Raises Refused."""
    if signed.key not in set(admins) or not signed_by(
        signed.key, signed.signature, roster_bytes(signed.data)
    ):
        raise Refused("the roster of operators is not signed by an admin of this fleet")
    try:
        roster = msgspec.msgpack.decode(signed.data, type=Roster)
    except msgspec.MsgspecError as error:
        raise Refused(f"the roster of operators is not understood: {error}") from None
    if roster.fleet != fleet:
        raise Refused(f"the roster of operators is that of fleet `{roster.fleet[:64]}`")
    return roster


def signers(roster: Roster, text: str, signatures: Iterable[tuple[bytes, bytes]]) -> set[str]:
    """Names of the operators and admins whose signatures over a job hold, each once."""
    data = job_bytes(roster.fleet, text)
    found = {roster.named(key) for key, signature in signatures if signed_by(key, signature, data)}
    return {name for name in found if name and RANKS[roster.operators[name].role] >= RANKS["operator"]}


def check_warrant(warrant: Warrant, fleet: str, admins: Iterable[bytes], oldest: int) -> Roster:
    """The roster of a warrant that enough operators signed; `oldest` is the lowest version that is taken.
    Raises Refused."""
    roster = read_roster(warrant.roster, fleet, admins)
    if roster.version < oldest:
        raise Refused(f"the roster of operators has version {roster.version}, this device has seen {oldest}")
    agreed = signers(roster, warrant.text, warrant.signatures)
    if len(agreed) < max(1, roster.approvals):
        raise Refused(
            f"{len(agreed)} operators signed the job, {max(1, roster.approvals)} must: "
            f"{', '.join(sorted(agreed)) or 'nobody'}"
        )
    return roster


def encode_key(raw: bytes) -> str:
    """32 bytes as people copy them."""
    return base64.urlsafe_b64encode(raw).decode().rstrip("=")


def decode_key(text: str, what: str) -> bytes:
    """The inverse. Raises ConfigError."""
    try:
        raw = base64.urlsafe_b64decode(text + "=" * (-len(text) % 4))
    except ValueError:
        raw = b""
    if len(raw) != 32:
        raise ConfigError(
            f"{what}: {text[:50]!r} is no key", "copy the line that `coordinator operators keygen` printed"
        )
    return raw


def pack(value: Any) -> bytes:
    """msgpack."""
    return msgspec.msgpack.encode(value)
