"""Claims and certificates: a device is invited once, shows its key once, and has a certificate from then
on, until it is revoked."""

import hmac
import logging
import time

import msgspec
from aiohttp import web

from rankfleet.federated.errors import WireError
from rankfleet.federated.trust.enrolment import (
    CertificateAnswer,
    CertificateRequest,
    mac_of,
    read_request,
    signed,
)
from rankfleet.federated.trust.roster import signed_by

from ..config import Enrolment as Config
from ..store.ledger import Ledger
from .authority import Authority
from .devices import Devices

log = logging.getLogger(__name__)
DAY_S = 86_400.0
MOST_A_DAY = 20
"""Certificates of one device; the table must not grow because something asks in a loop."""


class Enrolment:
    """The ledger's claims and certificates. Without an `authority` there are only claims."""

    def __init__(self, config: Config, ledger: Ledger, devices: Devices, authority: Authority | None) -> None:
        self.config, self.ledger, self.devices, self.authority = config, ledger, devices, authority
        self.refused = 0
        self._write_list()

    def invited(self, device: str) -> None:
        """A new claim: what the device of this name had before is void."""
        self.revoke(device)
        self.ledger.set_claim(device, time.time() + self.config.claim_days * DAY_S)

    def void(self, device: str) -> str:
        """Why a device that has not shown its key yet may not do so any more; empty if it may."""
        if self.devices.public(device):
            return ""
        claim = self.ledger.claim(device)
        if claim is None or time.time() <= claim["expires"]:
            return ""
        return f"the claim of `{device}` is older than {self.config.claim_days:g} days"

    def issue(self, asked: CertificateRequest) -> CertificateAnswer:
        """A certificate, at enrolment or to renew one. Raises WireError with the reason where there is
        none to be had."""
        if self.authority is None:
            raise WireError("this fleet has no certificates", "edge-agent enroll with a new claim token")
        content = signed(asked.device, asked.csr, asked.public_key)
        key = self.devices.key(asked.device)
        if key is None or not hmac.compare_digest(mac_of(key, content), asked.mac):
            raise WireError(
                "no claim of this device is known here",
                "coordinator invite NAME, and enrol with the new token",
            )
        if not signed_by(asked.public_key, asked.signature, content):
            raise WireError("the request is not signed by the key that it shows")
        if reason := self.void(asked.device):
            raise WireError(reason, "coordinator invite NAME, and enrol with the new token")
        if self.devices.public(asked.device) not in (b"", asked.public_key):
            raise WireError(
                "this claim was used by another device",
                "coordinator invite NAME, and find out who has the old token",
            )
        if self._lately(asked.device) >= MOST_A_DAY:
            raise WireError(
                f"{MOST_A_DAY} certificates were made for this device within a day",
                "what asks for so many? try again tomorrow",
            )
        made = self.authority.sign_request(asked.csr, asked.device, self.config.certificate_days)
        self.ledger.add_certificate(f"{made.serial:x}", asked.device, made.begins, made.ends)
        self.devices.bind(asked.device, asked.public_key)
        return CertificateAnswer(
            made.pem, self.authority.ca.read_text(encoding="ascii"), made.begins, made.ends
        )

    def _lately(self, device: str) -> int:
        """Certificates of the last day; those that ended long ago are forgotten."""
        now, rows = time.time(), self.ledger.certificates(device)
        for row in rows:
            if row["ends"] < now - 30 * DAY_S:
                self.ledger.remove_certificate(row["serial"])
        return sum(r["begins"] > now - DAY_S for r in rows)

    def ends(self) -> dict[str, float]:
        """Device → when its newest certificate ends."""
        rows = self.ledger.certificates()
        return {
            r["device"]: r["ends"] for r in sorted(rows, key=lambda r: float(r["ends"])) if not r["revoked"]
        }

    def revoke(self, device: str) -> bool:
        """Every certificate of a device is void from now on; True if there was one."""
        count = self.ledger.revoke_certificates(device, time.time())
        if count:
            self._write_list()
        return bool(count)

    def _write_list(self) -> None:
        if self.authority is not None:
            now = time.time()
            rows = self.ledger.certificates()
            self.authority.write_crl([int(r["serial"], 16) for r in rows if r["revoked"] and r["ends"] > now])

    async def answer(self, request: web.Request) -> web.Response:
        """`POST /certificate`."""
        try:
            made = self.issue(read_request(await request.read()))
        except WireError as error:
            self.refused += 1
            log.warning("a certificate was refused to %s: %s", request.remote, error)
            return web.json_response({"error": str(error.args[0]), "hint": error.hint}, status=403)
        return web.Response(body=msgspec.json.encode(made), content_type="application/json")
