"""The HTTP API on loopback that the CLI speaks, behind a token that lies beside the ledger, readable by
the owner alone."""

import secrets
from pathlib import Path

import msgspec
from aiohttp import web

from rankfleet.federated.program.files import write_atomic
from rankfleet.federated.program.health import plain

from ..health import conditions
from ..service import Service
from .answers import OPERATORS, TOKEN, answer, errors
from .devices import Devices
from .jobs import Jobs
from .operators import Roster
from .versions import Versions


class Api:
    """Routes onto a service."""

    def __init__(self, service: Service) -> None:
        self.service = service
        self.app = web.Application(middlewares=[errors], client_max_size=4 << 20)
        self.app[TOKEN] = secrets.token_urlsafe(24)
        self.app[OPERATORS] = service.operators
        jobs, devices, versions, roster = Jobs(service), Devices(service), Versions(service), Roster(service)
        self.app.add_routes(
            [
                web.get("/health", self.health),
                web.get("/jobs", jobs.jobs),
                web.post("/jobs", jobs.submit),
                web.post("/jobs/{job}/{verb}", jobs.verb),
                web.get("/jobs/{job}/text", jobs.text),
                web.get("/jobs/{job}/rounds", jobs.rounds),
                web.get("/jobs/{job}/progress", jobs.progress),
                web.get("/jobs/{job}/arms", jobs.arms),
                web.get("/operators", roster.operators),
                web.post("/operators", roster.replace_roster),
                web.get("/devices", devices.devices),
                web.post("/devices/{device}/invite", devices.invite),
                web.post("/devices/{device}/revoke", devices.revoke),
                web.post("/devices/{device}/{verb:suspend|resume}", devices.pause_device),
                web.post("/devices/{device}/{what:logs|doctor}", devices.bundle),
                web.get("/jobs/{job}/versions", versions.versions),
                web.post("/jobs/{job}/versions/{number}/{verb}", versions.version_verb),
            ]
        )

    async def start(self, home: Path, port: int) -> web.AppRunner:
        """Listen on loopback and write `api.json`."""
        runner = web.AppRunner(self.app, access_log=None)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", port)
        await site.start()
        real = runner.addresses[0][1]
        write_atomic(
            home / "api.json",
            msgspec.json.encode({"url": f"http://127.0.0.1:{real}", "token": self.app[TOKEN]}),
            0o600,
        )
        return runner

    async def health(self, request: web.Request) -> web.Response:
        """Is the service up, and does it reach its broker?"""
        s = self.service
        return answer(
            {
                "ok": s.bus.connected.is_set(),
                "broker": s.broker_url,
                "problem": s.jobs.problem or getattr(s.bus, "problem", ""),
                "dropped": s.dropped,
                "repeated": s.repeated,
                "not_read": s.admission.dropped,
                "certificates_refused": s.enrolment.refused,
                "corrupt_chunks": s.uploads.corrupt,
                "job": s.jobs.runner.job if s.jobs.runner else "",
                "conditions": plain(conditions(s)),
            }
        )
