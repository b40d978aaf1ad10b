"""Operators on the coordinator's side: the roster in force, who may do what, which jobs have signatures
enough, and what was done.

Without a roster whoever can read the token beside the ledger is the operator, as on a machine of one's own.
"""

import time
from collections import OrderedDict
from collections.abc import Mapping

import msgspec

from rankfleet.federated.errors import ConfigError, Refused
from rankfleet.federated.program.files import write_atomic
from rankfleet.federated.trust.roster import (
    RANKS,
    Roster,
    SignedRoster,
    Warrant,
    decode_key,
    pack,
    read_roster,
    request_bytes,
    signed_by,
    signers,
)

from ..config import CoordinatorConfig
from ..store.ledger import Ledger
from .oidc import Issuer

FRESH_S = 300.0
"""How far an operator's clock may be from ours, and so how long a request could be said again: those are
remembered."""


class Operators:
    """The roster lies in `data_dir/roster`; signatures and the audit trail lie in the ledger."""

    def __init__(self, config: CoordinatorConfig, ledger: Ledger) -> None:
        self.fleet, self.path, self.ledger = config.fleet, config.home / "roster", ledger
        self.issuer = Issuer(config.oidc)
        self.signed: SignedRoster | None = None
        self.roster: Roster | None = None
        self._heard: OrderedDict[bytes, float] = OrderedDict()
        if self.path.exists():
            self.signed = msgspec.msgpack.decode(self.path.read_bytes(), type=SignedRoster)
            self.roster = msgspec.msgpack.decode(self.signed.data, type=Roster)

    def admins(self) -> list[bytes]:
        """Keys that a new device must know."""
        return self.roster.admins() if self.roster else []

    def replace(self, data: bytes) -> Roster:
        """Take a new roster: signed by an admin of the one in force; the first by an admin of its own.
        Raises Refused."""
        try:
            signed = msgspec.msgpack.decode(data, type=SignedRoster)
            trusted = self.admins() or msgspec.msgpack.decode(signed.data, type=Roster).admins()
        except msgspec.MsgspecError as error:
            raise ConfigError(f"this is no roster: {error}") from None
        roster = read_roster(signed, self.fleet, trusted)
        if self.roster and roster.version <= self.roster.version:
            raise Refused(
                f"the roster has version {roster.version}, version {self.roster.version} is in force"
            )
        able = sum(RANKS[o.role] >= RANKS["operator"] for o in roster.operators.values())
        if not roster.admins() or able < roster.approvals:
            raise Refused(f"{able} operators could sign, {roster.approvals} must, and there must be an admin")
        write_atomic(self.path, pack(signed), 0o600)
        self.signed, self.roster = signed, roster
        self.audit(
            roster.named(signed.key), "roster", f"version {roster.version}: {', '.join(roster.operators)}"
        )
        return roster

    def allowed(self, method: str, path: str, body: bytes, headers: Mapping[str, str], role: str) -> str:
        """The operator who signed a request, or whom an issuer's token names, if that role or a higher one
        is his. Raises Refused.

        May ask the issuer: to be called in a thread.
        """
        if self.roster is None and not self.issuer.config.issuer:
            return "the owner of the token"
        if role == "viewer":
            return "anybody with the token"
        if (token := headers.get("X-Oidc", "")) and self.issuer.config.issuer:
            who, has = self.issuer.role(token)
            if RANKS[has] < RANKS[role]:
                raise Refused(f"`{who}` is a {has}; this takes the role {role}")
            self.audit(who, method, path)
            return who
        at, name, key, signature = self._claimed(headers)
        try:
            fresh = abs(time.time() - float(at)) <= FRESH_S
        except ValueError:
            fresh = False
        if not fresh:
            raise Refused(
                "the request was signed too long ago, or the clocks differ by more than five minutes"
            )
        if not name or not signed_by(key, signature, request_bytes(self.fleet, method, path, body, at)):
            raise Refused(
                "the request is not signed by an operator of this fleet", "--key FILE, or RANKFLEET_KEY"
            )
        if signature in self._heard:
            raise Refused("this very request was heard before")
        assert self.roster is not None
        if RANKS[self.roster.operators[name].role] < RANKS[role]:
            raise Refused(f"`{name}` is a {self.roster.operators[name].role}; this takes the role {role}")
        self._remember(signature)
        self.audit(name, method, path)
        return name

    def _claimed(self, headers: Mapping[str, str]) -> tuple[str, str, bytes, bytes]:
        if self.roster is None:
            raise Refused("no token of the issuer came with the request", "RANKFLEET_TOKEN")
        try:
            key = decode_key(headers.get("X-Operator", ""), "the operator's key")
            signature = bytes.fromhex(headers.get("X-Signature", ""))
        except (ConfigError, ValueError):
            raise Refused(
                "the request is not signed by an operator", "--key FILE, or RANKFLEET_KEY"
            ) from None
        return headers.get("X-At", ""), self.roster.named(key), key, signature

    def _remember(self, signature: bytes) -> None:
        now = time.time()
        self._heard[signature] = now
        while self._heard and now - next(iter(self._heard.values())) > 2 * FRESH_S:
            self._heard.popitem(last=False)

    def audit(self, who: str, what: str, text: str) -> None:
        """A line that stays."""
        self.ledger.add_audit(who, what, text)

    def sign(self, job: str, key: bytes, signature: bytes) -> list[str]:
        """An operator agrees to a job; returns who has by now. Raises Refused."""
        row = self.ledger.job(job)
        if row is None:
            raise ConfigError(f"no job `{job}`", "coordinator jobs")
        if self.roster is None or not signers(self.roster, row["text"], [(key, signature)]):
            raise Refused("that is no operator's signature over this job")
        self.ledger.add_signature(job, key, signature)
        return self.agreed(job, row["text"])

    def agreed(self, job: str, text: str) -> list[str]:
        """Operators whose signatures over a job hold under the roster in force."""
        return sorted(signers(self.roster, text, self._signatures(job))) if self.roster else []

    def _signatures(self, job: str) -> list[tuple[bytes, bytes]]:
        return self.ledger.signatures(job)

    def lacks(self, job: str, text: str) -> int:
        """How many operators must still agree before the job may run."""
        return max(0, self.roster.approvals - len(self.agreed(job, text))) if self.roster else 0

    def warrant(self, job: str, text: str) -> bytes | None:
        """What devices check; None without a roster."""
        return pack(Warrant(text, self._signatures(job), self.signed)) if self.signed else None


def role_for(method: str, path: str, dry: bool) -> str:
    """Which role a request takes: `path` without its query, `dry` for a job that is only looked at."""
    if method == "GET" or (path == "/jobs" and dry) or path == "/operators":
        return "viewer"  # a roster is signed itself, by an admin
    return "admin" if path.endswith("/revoke") else "operator"
