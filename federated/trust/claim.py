"""The claim token: what `coordinator invite` prints and `edge-agent enroll` reads.

It holds a secret from which both sides derive the key that seals their messages; the key itself never
travels.
"""

import base64
import binascii
import hashlib
import hmac

import msgspec

from ..errors import ConfigError
from ..transport.topics import checked

PREFIX = "rf1."


class Claim(msgspec.Struct, frozen=True, array_like=True):
    """What a claim token holds."""

    fleet: str
    device: str
    broker: str
    secret: bytes
    coordinator: bytes
    """Public key of the coordinator, 32 bytes."""
    door: str = ""
    """HTTPS address where the device gets its certificate; empty: the link has no TLS of ours."""
    pin: bytes = b""
    """SHA-256 of the public key that is shown there."""
    operators: list[bytes] = []
    """Keys of the fleet's admins: jobs must be signed by operators whom one of them named. Empty: the
    coordinator is trusted."""


def write_claim(claim: Claim) -> str:
    """The token that `coordinator invite` prints."""
    return PREFIX + base64.urlsafe_b64encode(msgspec.msgpack.encode(claim)).decode().rstrip("=")


def read_claim(token: str) -> Claim:
    """Raises ConfigError for anything that is not a token."""
    text = token.strip()
    try:
        if not text.startswith(PREFIX):
            raise ValueError("it does not start with rf1.")
        raw = base64.urlsafe_b64decode(text[len(PREFIX) :] + "=" * (-len(text[len(PREFIX) :]) % 4))
        claim = msgspec.msgpack.decode(raw, type=Claim)
    except (ValueError, binascii.Error, msgspec.MsgspecError) as error:
        raise ConfigError(
            f"this is not a claim token: {error}", "copy the whole line that `coordinator invite` printed"
        ) from None
    checked(claim.device)
    return claim


def link_key(claim: Claim) -> bytes:
    """The key that seals messages between this device and the coordinator."""
    return hmac.new(claim.secret, f"link {claim.fleet} {claim.device}".encode(), hashlib.sha256).digest()
