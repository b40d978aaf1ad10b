"""The fleet's own certificate authority: who may open a connection to the broker, and under which name.

A device makes its key itself and sends a signing request; whatever that asks for, the certificate says
what the device table says: common name = device, organisation = fleet, clients only. Revoked serial
numbers go into a list (CRL) that brokers read. P-256 and SHA-256 throughout: every TLS stack on a board
speaks them.
"""

import datetime
import ipaddress
import socket
from pathlib import Path
from typing import NamedTuple

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from rankfleet.federated.errors import ConfigError, WireError
from rankfleet.federated.program.files import write_atomic

PEM = serialization.Encoding.PEM
COORDINATOR = "coordinator"
YEARS_10, SERVER_DAYS, DEVICE_DAYS = 3650, 365, 90
MAX_REQUEST = 8192
SKEW = datetime.timedelta(hours=1)
"""Clocks of devices may be a little behind."""


class Issued(NamedTuple):
    """A certificate that was just signed."""

    pem: str
    serial: int
    begins: float
    ends: float


class Authority:
    """Keys and certificates under `<data_dir>/ca`, made at the first start; private keys are readable by
    the owner alone."""

    def __init__(self, home: Path, fleet: str) -> None:
        self.folder, self.fleet = home / "ca", fleet
        self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        key, cert = self.folder / "ca.key", self.folder / "ca.pem"
        if not cert.exists():
            self._key = ec.generate_private_key(ec.SECP256R1())
            write_atomic(key, _private(self._key), 0o600)
            name = _name(fleet, f"rankfleet {fleet}")
            made = _builder(name, name, self._key.public_key(), YEARS_10).add_extension(
                x509.BasicConstraints(True, 0), critical=True
            )
            made = made.add_extension(_usage(authority=True), critical=True)
            write_atomic(cert, made.sign(self._key, hashes.SHA256()).public_bytes(PEM))
        try:
            loaded = serialization.load_pem_private_key(key.read_bytes(), None)
            self._cert = x509.load_pem_x509_certificate(cert.read_bytes())
        except (OSError, ValueError) as error:
            raise ConfigError(
                f"the fleet's authority in {self.folder} cannot be read: {error}", "restore it from a backup"
            ) from None
        assert isinstance(loaded, ec.EllipticCurvePrivateKey)
        self._key = loaded

    @property
    def ca(self) -> Path:
        """The authority's certificate, for every client and broker of the fleet."""
        return self.folder / "ca.pem"

    @property
    def crl(self) -> Path:
        """The list of revoked certificates."""
        return self.folder / "crl.pem"

    def sign_request(self, request: str, device: str, days: float = DEVICE_DAYS) -> Issued:
        """A client certificate for `device`. Raises WireError for a request that is none."""
        if len(request) > MAX_REQUEST:
            raise WireError(f"a signing request of {len(request):,} bytes, at most {MAX_REQUEST:,} are read")
        try:
            asked = x509.load_pem_x509_csr(request.encode())
            public = asked.public_key()
            own = asked.is_signature_valid
        except (ValueError, TypeError, InvalidSignature) as error:
            raise WireError(f"not a signing request: {error}") from None
        if not own or not isinstance(public, ec.EllipticCurvePublicKey) or public.curve.name != "secp256r1":
            raise WireError("the signing request is not signed by its own P-256 key")
        return self._issue(public, device, days, ExtendedKeyUsageOID.CLIENT_AUTH, [])

    def server(self, names: list[str]) -> tuple[Path, Path]:
        """Certificate and key of this machine's servers for `names`; made again when a third of its life
        is left or names changed."""
        return self._own("server", names, ExtendedKeyUsageOID.SERVER_AUTH)

    def broker(self, names: list[str]) -> tuple[Path, Path]:
        """Certificate and key for a broker elsewhere."""
        return self._own("broker", names, ExtendedKeyUsageOID.SERVER_AUTH)

    def client(self) -> tuple[Path, Path]:
        """The coordinator's own certificate towards the broker."""
        return self._own(COORDINATOR, [], ExtendedKeyUsageOID.CLIENT_AUTH)

    def _own(self, what: str, names: list[str], use: x509.ObjectIdentifier) -> tuple[Path, Path]:
        cert, key = self.folder / f"{what}.pem", self.folder / f"{what}.key"
        if not key.exists():
            write_atomic(key, _private(ec.generate_private_key(ec.SECP256R1())), 0o600)
        private = serialization.load_pem_private_key(key.read_bytes(), None)
        assert isinstance(private, ec.EllipticCurvePrivateKey)
        wanted = alternative_names(names)
        has = _names_in(x509.load_pem_x509_certificate(cert.read_bytes())) if cert.exists() else []
        if (
            not cert.exists()
            or _old(x509.load_pem_x509_certificate(cert.read_bytes()))
            or not set(wanted) <= set(has)
        ):
            # Names are added, never taken away: broker and HTTPS server may be known by different ones.
            every = [*wanted, *(n for n in has if n not in wanted)]
            write_atomic(
                cert, self._issue(private.public_key(), COORDINATOR, SERVER_DAYS, use, every).pem.encode()
            )
        return cert, key

    def _issue(
        self,
        public: ec.EllipticCurvePublicKey,
        name: str,
        days: float,
        use: x509.ObjectIdentifier,
        names: list[x509.GeneralName],
    ) -> Issued:
        made = _builder(_name(self.fleet, name), self._cert.subject, public, days)
        made = made.add_extension(x509.BasicConstraints(False, None), critical=True).add_extension(
            _usage(), critical=True
        )
        made = made.add_extension(x509.ExtendedKeyUsage([use]), critical=False)
        if names:
            made = made.add_extension(x509.SubjectAlternativeName(names), critical=False)
        cert = made.sign(self._key, hashes.SHA256())
        ends = cert.not_valid_after_utc.timestamp()
        return Issued(
            cert.public_bytes(PEM).decode(), cert.serial_number, cert.not_valid_before_utc.timestamp(), ends
        )

    def ensure_crl(self) -> None:
        """Brokers want the list to be there, also while it is empty."""
        if not self.crl.exists():
            self.write_crl([])

    def write_crl(self, serials: list[int]) -> None:
        """The list of revoked certificates, signed; it must be there even while it is empty."""
        now = datetime.datetime.now(datetime.timezone.utc)
        made = x509.CertificateRevocationListBuilder().issuer_name(self._cert.subject).last_update(now - SKEW)
        made = made.next_update(now + datetime.timedelta(days=YEARS_10))
        for serial in sorted(serials):
            entry = x509.RevokedCertificateBuilder().serial_number(serial).revocation_date(now - SKEW).build()
            made = made.add_revoked_certificate(entry)
        write_atomic(self.crl, made.sign(self._key, hashes.SHA256()).public_bytes(PEM))


def alternative_names(names: list[str]) -> list[x509.GeneralName]:
    """Names and addresses as a certificate holds them."""
    found: list[x509.GeneralName] = []
    for name in sorted(set(names)):
        try:
            found.append(x509.IPAddress(ipaddress.ip_address(name)))
        except ValueError:
            found.append(x509.DNSName(name))
    return found


def own_names(*more: str) -> list[str]:
    """What this machine may be called: its names, loopback, and the addresses of its interfaces."""
    import psutil

    found = {"localhost", "127.0.0.1", "::1", socket.gethostname(), socket.getfqdn(), *(m for m in more if m)}
    for addresses in psutil.net_if_addrs().values():
        found |= {a.address.split("%")[0] for a in addresses if a.family in (socket.AF_INET, socket.AF_INET6)}
    return sorted(n for n in found if n and n not in ("0.0.0.0", "::"))  # noqa: S104 - compared with


def _old(cert: x509.Certificate) -> bool:
    """Is less than a third of its life left?"""
    begins, ends = cert.not_valid_before_utc, cert.not_valid_after_utc
    return datetime.datetime.now(datetime.timezone.utc) > ends - (ends - begins) / 3


def _names_in(cert: x509.Certificate) -> list[x509.GeneralName]:
    try:
        return list(cert.extensions.get_extension_for_class(x509.SubjectAlternativeName).value)
    except x509.ExtensionNotFound:
        return []


def _name(fleet: str, common: str) -> x509.Name:
    return x509.Name(
        [
            x509.NameAttribute(NameOID.ORGANIZATION_NAME, fleet),
            x509.NameAttribute(NameOID.COMMON_NAME, common),
        ]
    )


def _builder(
    subject: x509.Name, issuer: x509.Name, public: ec.EllipticCurvePublicKey, days: float
) -> x509.CertificateBuilder:
    now = datetime.datetime.now(datetime.timezone.utc)
    made = x509.CertificateBuilder().subject_name(subject).issuer_name(issuer).public_key(public)
    made = made.serial_number(x509.random_serial_number())
    return made.not_valid_before(now - SKEW).not_valid_after(now + datetime.timedelta(days=days))


def _usage(authority: bool = False) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not authority, content_commitment=False, key_encipherment=False,
        data_encipherment=False,
        key_agreement=False, key_cert_sign=authority, crl_sign=authority, encipher_only=False,
        decipher_only=False,
    )  # fmt: skip


def _private(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
