"""The roster of operators over HTTP."""

from aiohttp import web

from rankfleet.federated.trust.roster import encode_key

from ..service import Service
from .answers import answer


class Roster:
    """Handlers of `/operators`."""

    def __init__(self, service: Service) -> None:
        self.service = service

    async def operators(self, request: web.Request) -> web.Response:
        """The roster in force, and what was done."""
        roster = self.service.operators.roster
        people = (
            {n: {"role": o.role, "key": encode_key(o.key)} for n, o in roster.operators.items()}
            if roster
            else {}
        )
        trail = [dict(r) for r in self.service.ledger.audit(100)]
        return answer(
            {"fleet": self.service.config.fleet, "version": roster.version if roster else 0,
            "operators": people, "audit": trail,
             "approvals": roster.approvals if roster else 0}
        )  # fmt: skip

    async def replace_roster(self, request: web.Request) -> web.Response:
        """A new roster, signed by an admin of the one in force."""
        roster = self.service.operators.replace(await request.read())
        return answer({"version": roster.version, "operators": list(roster.operators)})
