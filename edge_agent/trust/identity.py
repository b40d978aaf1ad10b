"""Who this device is: name, fleet, broker, link key and coordinator key from enrolment; its own Ed25519
key beside them.

The link key never travels: both sides derive it from the secret in the claim token. Only the worker and
`enroll` import `cryptography`; the idle service needs the standard library alone.
"""

import os
import shutil
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from rankfleet.federated.errors import ConfigError
from rankfleet.federated.program.files import write_atomic
from rankfleet.federated.trust.claim import Claim, link_key, read_claim

from . import certificate

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey


FLEETS_OWN = ("epoch", "roster.version")
"""What the state directory remembers of one coordinator's life, beside the jobs."""


class Identity(msgspec.Struct, frozen=True):
    """The enrolled device, as `identity.json` keeps it."""

    fleet: str
    device: str
    broker: str
    link_key: bytes
    coordinator: bytes
    public_key: bytes
    operators: list[bytes] = []
    """Keys of the fleet's admins, from the claim token; empty: the coordinator's signature is enough."""


def enroll(token: str, home: Path, again: bool = False) -> Identity:
    """Make the device's key, get a certificate where the fleet has them, and keep all, readable by the
    owner alone.

    `again` replaces an earlier enrolment and keeps the rest of the state. Raises ConfigError, and
    RankfleetError where the coordinator refuses or does not answer; then nothing has changed and the token
    can be tried again.
    """
    claim = read_claim(token)
    if (home / "identity.json").exists() and not again:
        known = load(home)
        raise ConfigError(
            f"this device is enrolled as `{known.device}` in fleet `{known.fleet}`",
            "edge-agent enroll --again TOKEN, or edge-agent leave",
        )
    try:
        home.mkdir(parents=True, exist_ok=True)
        os.chmod(home, 0o700)
        private = _key_of(claim, home)
        public = private.public_key().public_bytes_raw()
        identity = Identity(
            claim.fleet,
            claim.device,
            claim.broker,
            link_key(claim),
            claim.coordinator,
            public,
            claim.operators,
        )
        if claim.door:
            certificate.obtain(home, claim.device, identity.link_key, private, claim.door, claim.pin)
        if again:
            # Rounds, epoch and roster are those of the fleet before: another one's jobs may have the same
            # names, and lower numbers.
            shutil.rmtree(home / "jobs", ignore_errors=True)
            for name in FLEETS_OWN:
                (home / name).unlink(missing_ok=True)
        write_atomic(home / "device.key", private.private_bytes_raw(), 0o600)
        write_atomic(home / "identity.json", msgspec.json.encode(identity), 0o600)
        (home / "enrolling.key").unlink(missing_ok=True)
    except OSError as error:
        raise ConfigError(
            f"{home}: {error.strerror}", "set `state_dir` to a folder that this user may write"
        ) from None
    return identity


def _key_of(claim: Claim, home: Path) -> "Ed25519PrivateKey":
    """The key for this claim: a claim takes the first key that is shown, so after an answer that was lost
    it must be the same."""
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    path, mark = home / "enrolling.key", link_key(claim)[:8]
    kept = path.read_bytes() if path.exists() else b""
    if kept[:8] == mark and len(kept) == 40:
        return Ed25519PrivateKey.from_private_bytes(kept[8:])
    private = Ed25519PrivateKey.generate()
    write_atomic(path, mark + private.private_bytes_raw(), 0o600)
    return private


def load(home: Path) -> Identity:
    """The identity in a state directory. Raises ConfigError where there is none."""
    try:
        return msgspec.json.decode((home / "identity.json").read_bytes(), type=Identity)
    except FileNotFoundError:
        raise ConfigError(f"{home}: this device is not enrolled", "edge-agent enroll TOKEN") from None
    except (OSError, msgspec.MsgspecError) as error:
        raise ConfigError(
            f"{home / 'identity.json'}: {error}", "edge-agent leave, then enroll again"
        ) from None


@cache
def known(home: Path) -> Identity:
    """The identity, read once in a process that serves one device for its life. Raises ConfigError."""
    return load(home)


@cache
def signer(home: Path) -> "Ed25519PrivateKey":
    """The device's signing key, read once; for the worker."""
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    return Ed25519PrivateKey.from_private_bytes((home / "device.key").read_bytes())
