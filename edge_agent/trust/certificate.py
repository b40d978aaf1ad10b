"""The device's TLS certificate: asked for at enrolment, renewed while a third of its life is left.

Key and certificate lie in one file, so that they change together. The idle service imports no
`cryptography`: renewing is a child process, `python -m rankfleet.edge_agent.trust.certificate STATE_DIR`.
"""

import asyncio
import contextlib
import json
import logging
import ssl
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol
from urllib.parse import urlsplit

import msgspec

from rankfleet.federated.errors import RankfleetError, Refused, Unreachable, WireError
from rankfleet.federated.program.files import write_atomic
from rankfleet.federated.transport.address import tls_context

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    from rankfleet.federated.transport.bus import Bus


log = logging.getLogger(__name__)
LOOK_S, RETRY_S, CLOCK_S = 3600.0, 600.0, 5.0
TIMEOUT_S = 30.0


class Facts(msgspec.Struct, frozen=True):
    """What the service must know of the certificate: how long it holds, and where the next one comes from."""

    door: str
    pin: bytes
    begins: float
    ends: float

    def renew_at(self) -> float:
        """When a third of its life is left."""
        return self.ends - (self.ends - self.begins) / 3


def facts(home: Path) -> Facts | None:
    """None where the link has no certificate of ours."""
    try:
        return msgspec.json.decode((home / "tls" / "facts.json").read_bytes(), type=Facts)
    except (OSError, msgspec.MsgspecError):
        return None


def context(home: Path) -> ssl.SSLContext | None:
    """TLS with the fleet's authority and our certificate; None where there is none. Raises ConfigError
    where the files are damaged."""
    folder = home / "tls"
    return (
        tls_context(str(folder / "ca.pem"), str(folder / "device.pem"))
        if (folder / "device.pem").exists()
        else None
    )


class Shown(Protocol):
    """Where people look: the agent's status."""

    def write(self, **facts: Any) -> None:
        """Facts by name, on disk at once."""

    def fail(self, reason: str) -> None:
        """The last thing that went wrong."""


async def keep(home: Path, bus: "Bus", status: Shown) -> None:
    """Connect once the clock can be right, and renew in time, for ever."""
    known = facts(home)
    while known is not None and time.time() < known.begins:
        # Without a battery a clock starts in 1970 or when the image was made; TLS would fail for a reason
        # that nobody guesses.
        status.write(
            state="waiting for the time",
            last_error=f"the clock says {time.strftime('%Y-%m-%d')}, the certificate is younger",
        )
        await asyncio.sleep(CLOCK_S)
        if time.time() >= known.begins:
            status.write(state="connecting", last_error="")
    await bus.start()
    while known is not None:
        left = known.renew_at() - time.time()
        if left > 0:
            await asyncio.sleep(min(LOOK_S, left))
            continue
        if (reason := await _renewed(home)) == "":
            known = facts(home) or known
            with contextlib.suppress(OSError):  # an SSLError is one; the old certificate holds for a while
                if (tls := getattr(bus, "tls", None)) is not None:
                    tls.load_cert_chain(
                        home / "tls" / "device.pem"
                    )  # for the next connection; this one goes on
            await asyncio.sleep(CLOCK_S)
            continue
        log.error("the certificate cannot be renewed: %s", reason)
        status.fail(
            f"the certificate ends on {time.strftime('%Y-%m-%d', time.localtime(known.ends))} and cannot be "
            f"renewed: {reason}"
        )
        await asyncio.sleep(RETRY_S)


async def _renewed(home: Path) -> str:
    """In a child: an empty text, or why not."""
    try:
        child = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "rankfleet.edge_agent.trust.certificate",
            str(home),
            stdout=asyncio.subprocess.DEVNULL,
            stderr=asyncio.subprocess.PIPE,
        )
    except OSError as error:
        return f"no process can be started: {error}"
    _, said = await child.communicate()
    return (
        ""
        if child.returncode == 0
        else said.decode("utf-8", "replace").strip()[-300:] or f"code {child.returncode}"
    )


def obtain(
    home: Path, device: str, link_key: bytes, signer: "Ed25519PrivateKey", door: str, pin: bytes
) -> Facts:
    """A new key, a certificate for it, both on disk. Raises Refused, Unreachable, WireError."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    from rankfleet.federated.trust.enrolment import CertificateAnswer, CertificateRequest, mac_of, signed

    private = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, device)])
    made = x509.CertificateSigningRequestBuilder().subject_name(name).sign(private, hashes.SHA256())
    csr, public = (
        made.public_bytes(serialization.Encoding.PEM).decode(),
        signer.public_key().public_bytes_raw(),
    )
    content = signed(device, csr, public)
    asked = CertificateRequest(device, csr, public, signer.sign(content), mac_of(link_key, content))
    said = _post(door, pin, msgspec.json.encode(asked))
    try:
        answer = msgspec.json.decode(said, type=CertificateAnswer)
    except msgspec.MsgspecError as error:
        raise WireError(f"{door} answers something else than a certificate: {error}") from None
    pem = private.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    found = Facts(door, pin, answer.begins, answer.ends)
    write_atomic(home / "tls" / "ca.pem", answer.authority.encode(), 0o600)
    write_atomic(home / "tls" / "device.pem", pem + answer.certificate.encode(), 0o600)
    write_atomic(home / "tls" / "facts.json", msgspec.json.encode(found), 0o600)
    return found


def _post(door: str, pin: bytes, body: bytes) -> bytes:
    from http.client import HTTPException, HTTPSConnection

    from rankfleet.federated.trust.enrolment import PATH, public_pin

    where = urlsplit(door)
    # The pin replaces authorities and names: it came with the claim.
    unchecked = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    unchecked.check_hostname, unchecked.verify_mode = False, ssl.CERT_NONE
    connection = HTTPSConnection(
        where.hostname or "", where.port or 443, timeout=TIMEOUT_S, context=unchecked
    )
    with contextlib.closing(connection):
        try:
            connection.connect()
            if public_pin(connection.sock.getpeercert(binary_form=True) or b"") != pin:
                raise WireError(
                    f"{door} shows another key than the claim token names",
                    "somebody is in between, or the token is old",
                )
            connection.request("POST", PATH, body, {"Content-Type": "application/json"})
            answer = connection.getresponse()
            said = answer.read(1 << 16)
        except (OSError, HTTPException) as error:
            raise Unreachable(
                f"{door} does not answer: {error}", "is the coordinator running, and its `https` port open?"
            ) from None
    if answer.status != 200:
        told = _told(said)
        raise Refused(
            f"the coordinator gives no certificate: {told.get('error', answer.status)}",
            str(told.get("hint", "")),
        )
    return said


def _told(said: bytes) -> dict[str, Any]:
    try:
        found = json.loads(said)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def main() -> int:
    """Renew the certificate of the device whose state directory is named."""
    from . import identity

    home = Path(sys.argv[1])
    try:
        known, who = facts(home), identity.load(home)
        if known is not None:
            obtain(home, who.device, who.link_key, identity.signer(home), known.door, known.pin)
    except RankfleetError as error:
        sys.stderr.write(f"{error}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
