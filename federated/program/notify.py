"""Says to systemd that a service is up, alive, or ending: datagrams to the socket that `Type=notify`
names. Elsewhere nothing."""

import asyncio
import contextlib
import os
import socket
from collections.abc import Callable


def notify(*facts: str) -> bool:
    """Send `READY=1`, `WATCHDOG=1`, `STOPPING=1`, `STATUS=…`; False where nobody listens."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if not address or not hasattr(socket, "AF_UNIX"):
        return False
    name = "\0" + address[1:] if address[0] == "@" else address
    with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as out:
        out.sendto("\n".join(facts).encode(), name)
        return True
    return False


def watchdog_s() -> float | None:
    """How often systemd wants a sign of life from this process, halved as it recommends; None: not at all."""
    if os.environ.get("WATCHDOG_PID", str(os.getpid())) != str(os.getpid()):
        return None
    with contextlib.suppress(KeyError, ValueError):
        return int(os.environ["WATCHDOG_USEC"]) / 2e6
    return None


async def alive(status: Callable[[], str]) -> None:
    """READY now, then a sign of life as often as it is wanted, for ever. It comes from the event loop: a
    loop that hangs is restarted."""
    notify("READY=1", f"STATUS={status()}")
    every = watchdog_s()
    while True:
        await asyncio.sleep(every or 60.0)
        notify("WATCHDOG=1", f"STATUS={status()}")
