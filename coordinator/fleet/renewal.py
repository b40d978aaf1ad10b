"""The coordinator's own certificates, renewed while it runs: a service that is up for years must not end
with one of them."""

import asyncio
import contextlib
import logging
import ssl
from collections.abc import Callable

from .authority import Authority

log = logging.getLogger(__name__)
LOOK_S = 86_400.0


async def keep(
    authority: Authority, names: list[str], client: ssl.SSLContext | None, changed: Callable[[], None]
) -> None:
    """For ever: new files when a third of their life is left; `changed` brings the server's to those who
    show it."""
    while True:
        await asyncio.sleep(LOOK_S)
        with contextlib.suppress(OSError):  # a full disk: tomorrow again, there are months left
            renew(authority, names, client, changed)


def renew(
    authority: Authority, names: list[str], client: ssl.SSLContext | None, changed: Callable[[], None]
) -> None:
    """Once."""
    cert, _ = before = authority.folder / "server.pem", authority.folder / "coordinator.pem"
    old = [p.read_bytes() if p.exists() else b"" for p in before]
    authority.server(names)
    own, key = authority.client()
    if client is not None and own.read_bytes() != old[1]:
        client.load_cert_chain(own, key)  # for the next connection
    if cert.read_bytes() != old[0]:
        log.warning("the server's certificate was renewed; connections to the broker begin anew")
        changed()
