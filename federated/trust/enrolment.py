"""How a device gets its certificate: one request over HTTPS, under the claim's key and signed by the
device's own.

The server shows the key that the claim token names, so the device trusts it before it has any authority. A
request that is sent again by somebody else gains nothing: the certificate is for a key that only the
device has.
"""

import hashlib
import hmac

import msgspec

from ..errors import WireError

PATH = "/certificate"
MAX_BODY = 16_384


class CertificateRequest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Please sign this; `csr` is a PEM signing request for the device's TLS key."""

    device: str
    csr: str
    public_key: bytes
    """Ed25519, 32 bytes: the key that signs the device's updates. The first one that is shown under a
    claim stays."""
    signature: bytes
    """By that key, over `signed`."""
    mac: bytes
    """Under the link key, over the same."""


class CertificateAnswer(msgspec.Struct, frozen=True):
    """The certificate, the fleet's authority, and how long the certificate holds (seconds since 1970)."""

    certificate: str
    authority: str
    begins: float
    ends: float


def signed(device: str, csr: str, public_key: bytes) -> bytes:
    """What signature and MAC cover."""
    return b"rankfleet certificate 1\n" + b"\n".join(
        (device.encode(), public_key.hex().encode(), csr.encode())
    )


def mac_of(link_key: bytes, content: bytes) -> bytes:
    """Shows that the sender holds the claim."""
    return hmac.new(link_key, content, hashlib.sha256).digest()


def read_request(body: bytes) -> CertificateRequest:
    """Raises WireError for anything else."""
    if len(body) > MAX_BODY:
        raise WireError(f"a certificate request of {len(body):,} bytes, at most {MAX_BODY:,} are read")
    try:
        return msgspec.json.decode(body, type=CertificateRequest)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise WireError(f"not a certificate request: {error}") from None


def public_pin(cert: bytes) -> bytes:
    """SHA-256 of the public key in a certificate (DER): stays the same when the certificate is renewed."""
    from cryptography import x509
    from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

    public = x509.load_der_x509_certificate(cert).public_key()
    return hashlib.sha256(public.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)).digest()
