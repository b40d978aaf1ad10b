"""Devices over HTTP: invite, keep out, let in again, ask for their logs."""

from aiohttp import web

from ..service import Service
from .answers import answer


class Devices:
    """Handlers of `/devices`."""

    def __init__(self, service: Service) -> None:
        self.service = service

    async def devices(self, request: web.Request) -> web.Response:
        """The fleet."""
        self.service.flush()
        ends = self.service.enrolment.ends()
        return answer(
            [
                {
                    **row,
                    "certificate_ends": ends.get(row["device"]),
                    "live": self.service.live.get(row["device"], {}),
                }
                for row in self.service.devices.table()
            ]
        )

    async def invite(self, request: web.Request) -> web.Response:
        """A claim token."""
        device = request.match_info["device"]
        return answer({"device": device, "token": self.service.invite(device)})

    async def revoke(self, request: web.Request) -> web.Response:
        """Shut a device out."""
        device = request.match_info["device"]
        return answer({"device": device, "done": "revoke", "by_hand": self.service.revoke(device)})

    async def pause_device(self, request: web.Request) -> web.Response:
        """suspend or resume."""
        device, verb = request.match_info["device"], request.match_info["verb"]
        if verb == "suspend":
            self.service.suspend(device, "by an operator")
        else:
            self.service.resume(device)
        return answer({"device": device, "done": verb})

    async def bundle(self, request: web.Request) -> web.Response:
        """The device's log, or what its doctor finds."""
        device, what = request.match_info["device"], request.match_info["what"]
        return answer(
            {
                "device": device,
                "text": await self.service.support.ask(device, "logs" if what == "logs" else "doctor"),
            }
        )
