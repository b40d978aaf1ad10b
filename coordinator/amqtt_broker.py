"""amqtt as a process: `python -m coordinator.amqtt_broker HOST PORT`. MQTT 3.1.1 only; for machines without Mosquitto."""

import asyncio
import contextlib
import logging
import os
import signal
import sys

from federated.within import within


async def serve(host: str, port: int) -> None:
    """Until SIGTERM."""
    from amqtt.broker import Broker

    logging.disable(logging.CRITICAL)
    broker = Broker(
        {
            "listeners": {"default": {"type": "tcp", "bind": f"{host}:{port}", "max_connections": 20000}},
            "plugins": {"amqtt.plugins.authentication.AnonymousAuthPlugin": {"allow_anonymous": True}},
        }
    )
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
    asyncio.run(serve(sys.argv[1], int(sys.argv[2])))
