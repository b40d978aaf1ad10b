"""amqtt as a process: `python -m rankfleet.coordinator.broker.amqtt_broker HOST PORT FLEET [CA CERT KEY
CRL]`. MQTT 3.1.1 only.

For machines without Mosquitto. With the four files every client needs a certificate, and may do what
`access.py` allows it.
"""

import asyncio
import contextlib
import logging
import os
import signal
import sys
from typing import Any

from rankfleet.federated.program.within import within


def configuration(host: str, port: str, fleet: str, files: list[str]) -> dict[str, Any]:
    """What amqtt's `Broker` takes."""
    listener: dict[str, Any] = {"type": "tcp", "bind": f"{host}:{port}", "max_connections": 20000}
    if not files:
        plugins: dict[str, Any] = {
            "amqtt.plugins.authentication.AnonymousAuthPlugin": {"allow_anonymous": True}
        }
    else:
        ca, cert, key, crl = files
        listener |= {"ssl": True, "cafile": ca, "certfile": cert, "keyfile": key}
        plugins = {
            f"rankfleet.coordinator.broker.amqtt_rules.{name}": {"fleet": fleet, "crl": crl}
            for name in ("Known", "Rules")
        }
    return {"listeners": {"default": listener}, "plugins": plugins}


async def serve(host: str, port: str, fleet: str, files: list[str]) -> None:
    """Until SIGTERM."""
    from amqtt.broker import Broker

    logging.disable(logging.CRITICAL)
    broker = Broker(configuration(host, port, fleet, files))
    await broker.start()
    ended = asyncio.Event()
    with contextlib.suppress(NotImplementedError):
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, ended.set)
    parent = os.getppid()
    while not ended.is_set() and os.getppid() == parent:
        with contextlib.suppress(asyncio.TimeoutError):
            await within(1.0, ended.wait())
    await broker.shutdown()


if __name__ == "__main__":
    asyncio.run(serve(sys.argv[1], sys.argv[2], sys.argv[3], sys.argv[4:]))
