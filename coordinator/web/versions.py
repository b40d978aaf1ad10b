"""Versions over HTTP: what devices measured of them, and what an operator says."""

from aiohttp import web

from rankfleet.federated.errors import ConfigError

from ..service import Service
from ..store import database
from .answers import answer


class Versions:
    """Handlers of `/jobs/{job}/versions`."""

    def __init__(self, service: Service) -> None:
        self.service = service

    async def versions(self, request: web.Request) -> web.Response:
        """Versions with their held-out figures."""
        rows = self.service.ledger.versions(request.match_info["job"])
        return answer(
            [
                {
                    "version": r["number"],
                    "state": r["state"],
                    "digest": r["digest"],
                    "created": r["created"],
                    "metrics": database.read(r["metrics"]),
                }
                for r in rows
            ]
        )

    async def version_verb(self, request: web.Request) -> web.Response:
        """promote: this version is good. rollback: this version is good and every later one is not."""
        job, verb, text = request.match_info["job"], request.match_info["verb"], request.match_info["number"]
        number = int(text) if text.isdigit() else -1
        rows = {r["number"]: r for r in self.service.ledger.versions(job)}
        if number not in rows or not (self.service.config.home / "jobs" / job / f"v{number:06d}").exists():
            raise ConfigError(
                f"job `{job}` has no version {text} on disk", f"coordinator versions list {job}"
            )
        if verb not in ("promote", "rollback"):
            raise ConfigError(f"`{verb}` is not one of promote, rollback")
        self.service.ledger.set_version(job, number, "good")
        for later in (n for n in rows if n > number and verb == "rollback"):
            self.service.ledger.set_version(job, later, "rolled back")
        return answer({"job": job, "version": number, "done": verb})
