"""The HTTPS server: certificates for devices, and base models for those that have none, with ranges, by
the model's digest.

For models a device shows that it belongs to the fleet by an HMAC over path and time under its link key.
The certificate is the authority's, or made here, unless one is configured; its fingerprint travels in
every signed assignment, and its key's in every claim, so a device trusts this server before it knows any
authority.
"""

import datetime
import hashlib
import hmac
import ipaddress
import socket
import ssl
import time
from collections.abc import Callable
from pathlib import Path
from urllib.parse import urlsplit

from aiohttp import web

from rankfleet.federated.errors import ConfigError
from rankfleet.federated.program.files import digest_of_file, write_atomic
from rankfleet.federated.trust.enrolment import MAX_BODY, PATH, public_pin
from rankfleet.federated.wire.messages import ModelSource, model_ticket

from ..config import Https
from ..fleet.authority import own_names
from ..fleet.enrolment import Enrolment

STALE_S = 900.0
CERTIFICATES_PORT = 8443
SERVED = (".safetensors", ".json", ".txt", ".model", ".jinja")


class HttpsServer:
    """Serves the folders that `offer` names, and what `enrolment` answers; listens on `host` where the
    YAML says nothing else."""

    def __init__(
        self,
        config: Https,
        home: Path,
        key_of: Callable[[str], bytes | None],
        enrolment: Enrolment | None = None,
        host: str = "127.0.0.1",
    ) -> None:
        self.config, self.home, self.key_of, self.enrolment, self.host = (
            config,
            home,
            key_of,
            enrolment,
            config.host or host,
        )
        self.url = self.pin = ""
        self.public_pin = b""
        self._folders: dict[str, Path] = {}
        self._digests: dict[Path, tuple[float, str]] = {}
        self._runner: web.AppRunner | None = None
        self._context: ssl.SSLContext | None = None

    async def start(self) -> None:
        """Listen. Raises ConfigError where the certificate cannot be used."""
        app = web.Application(client_max_size=MAX_BODY + 1)
        if self.enrolment:
            app.add_routes([web.post(PATH, self.enrolment.answer)])
        app.add_routes(
            [web.get("/models/{digest}", self._list), web.get("/models/{digest}/{name}", self._file)]
        )
        self._runner = web.AppRunner(app, access_log=None)
        await self._runner.setup()
        cert, key = self._certificate()
        self._context = context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        try:
            self._show(context, cert, key)
        except (OSError, ssl.SSLError, ValueError) as error:
            raise ConfigError(f"https: {cert}: {error}", "PEM files, readable by the service") from None
        certificates = self.enrolment is not None and self.enrolment.authority is not None
        port = self.config.port if self.config.port is not None else CERTIFICATES_PORT if certificates else 0
        await web.TCPSite(self._runner, self.host, port, ssl_context=context).start()
        port = self._runner.addresses[0][1]
        name = socket.getfqdn() if self.host in ("0.0.0.0", "::") else self.host  # noqa: S104 - compared with
        self.url = self.config.advertise or f"https://{name}:{port}"

    def reload(self) -> None:
        """The certificate was renewed: show the new one from the next connection on."""
        if self._context is not None:
            self._show(self._context, *self._certificate())

    def _show(self, context: ssl.SSLContext, cert: Path, key: Path) -> None:
        context.load_cert_chain(cert, key)
        der = ssl.PEM_cert_to_DER_cert(first_certificate(cert.read_text(encoding="ascii")))
        self.pin, self.public_pin = hashlib.sha256(der).hexdigest(), public_pin(der)

    async def stop(self) -> None:
        """Close."""
        if self._runner:
            await self._runner.cleanup()

    def offer(self, digest: str, folder: Path) -> ModelSource | None:
        """Where a device finds a model; None while none is served."""
        if not self.url or not self.config.models:
            return None
        self._folders[digest] = folder
        return ModelSource(self.url, self.pin)

    def _certificate(self) -> tuple[Path, Path]:
        if self.config.cert_file:
            return Path(self.config.cert_file), Path(self.config.key_file)
        if self.enrolment and self.enrolment.authority:
            return self.enrolment.authority.server(
                own_names(self.host, urlsplit(self.config.advertise).hostname or "")
            )
        cert, key = self.home / "models.crt", self.home / "models.key"
        if not cert.exists() or not key.exists():
            make_certificate(cert, key, self.host)
        return cert, key

    def _allowed(self, request: web.Request) -> Path:
        """The folder that is asked for. Raises the HTTP error."""
        device, at, said = (request.headers.get(f"X-Rankfleet-{n}", "") for n in ("Device", "Time", "Ticket"))
        key = self.key_of(device)
        fresh = at.isdigit() and abs(time.time() - int(at)) < STALE_S
        if key is None or not fresh or not hmac.compare_digest(model_ticket(key, request.path, at), said):
            raise web.HTTPForbidden(
                text="this device is not known here, or its clock is wrong by more than 15 minutes"
            )
        folder = self._folders.get(request.match_info["digest"])
        if folder is None:
            raise web.HTTPNotFound(text="this model is not offered")
        return folder

    async def _list(self, request: web.Request) -> web.Response:
        folder = self._allowed(request)
        files = [p for p in sorted(folder.iterdir()) if p.is_file() and p.suffix in SERVED]
        return web.json_response(
            [{"name": p.name, "size": p.stat().st_size, "digest": self._digest(p)} for p in files]
        )

    def _digest(self, file: Path) -> str:
        changed = file.stat().st_mtime
        if self._digests.get(file, (0.0, ""))[0] != changed:
            self._digests[file] = (changed, digest_of_file(file))
        return self._digests[file][1]

    async def _file(self, request: web.Request) -> web.StreamResponse:
        folder, name = self._allowed(request), request.match_info["name"]
        if name not in {p.name for p in folder.iterdir() if p.suffix in SERVED}:
            raise web.HTTPNotFound(text="no such file")
        return web.FileResponse(folder / name)


def first_certificate(pem: str) -> str:
    """The leaf of a chain. Raises ValueError where there is none."""
    end = "-----END CERTIFICATE-----"
    return pem[pem.index("-----BEGIN CERTIFICATE-----") : pem.index(end) + len(end)] + "\n"


def make_certificate(cert: Path, key: Path, host: str) -> None:
    """A self-signed P-256 certificate for ten years; devices pin it."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.x509.oid import NameOID

    private = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "rankfleet coordinator")])
    now = datetime.datetime.now(datetime.timezone.utc)
    names: list[x509.GeneralName] = [x509.DNSName("localhost"), x509.DNSName(socket.getfqdn())]
    try:
        names.append(x509.IPAddress(ipaddress.ip_address(host)))
    except ValueError:
        names.append(x509.DNSName(host))
    made = (
        x509.CertificateBuilder().subject_name(name).issuer_name(name).public_key(private.public_key())
        .serial_number(x509.random_serial_number()).not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=3650))
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .sign(private, hashes.SHA256())
    )  # fmt: skip
    pem, raw = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8
    write_atomic(key, private.private_bytes(pem, raw, serialization.NoEncryption()), 0o600)
    write_atomic(cert, made.public_bytes(pem))
