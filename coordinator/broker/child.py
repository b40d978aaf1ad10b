"""The broker that `coordinator serve` brings: Mosquitto as a managed child where it is installed, else
amqtt in a child.

A child of its own, in both cases, so that a broker that dies takes nothing with it and is started again.
"""

import asyncio
import contextlib
import logging
import shutil
import socket
import sys
from pathlib import Path

from rankfleet.federated.errors import ConfigError
from rankfleet.federated.program.files import write_atomic

from ..config import Broker
from . import access

log = logging.getLogger(__name__)
LOOPBACK, EVERYWHERE = "127.0.0.1", ("0.0.0.0", "::")  # noqa: S104 - compared with, not listened on


def mosquitto() -> str | None:
    """The Mosquitto server, if it is installed; Debian puts it where users' PATH does not look."""
    return shutil.which("mosquitto") or next(
        (
            p
            for p in ("/usr/sbin/mosquitto", "/opt/homebrew/sbin/mosquitto", "/usr/local/sbin/mosquitto")
            if Path(p).exists()
        ),
        None,
    )


def free_port() -> int:
    """A TCP port on loopback that nobody uses now."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


class BrokerChild:
    """Runs until `stop`, restarted with a growing pause when it ends."""

    def __init__(
        self, config: Broker, home: Path, fleet: str = "main", tls: access.Files | None = None
    ) -> None:
        self.kind = config.kind if config.kind != "auto" else ("mosquitto" if mosquitto() else "amqtt")
        if self.kind == "mosquitto" and not mosquitto():
            raise ConfigError(
                "broker.kind is mosquitto, and no mosquitto is installed",
                "apt install mosquitto, or `kind: amqtt`",
            )
        if self.kind not in ("mosquitto", "amqtt"):
            raise ConfigError(f"broker.kind `{config.kind}` is not known", "auto, mosquitto or amqtt")
        standard = 1883 if tls is None else 8883
        self.host, self.port, self.home = (
            config.host,
            standard if config.port is None else config.port or free_port(),
            home,
        )
        self.fleet, self.tls = fleet, tls
        self.process: asyncio.subprocess.Process | None = None
        self.restarts = 0
        self._cut = False
        self._task: asyncio.Task[None] | None = None

    @property
    def url(self) -> str:
        """Address for clients on this machine."""
        return f"{self._scheme}://{LOOPBACK if self.host in EVERYWHERE else self.host}:{self.port}"

    @property
    def public_url(self) -> str:
        """Address for devices."""
        return f"{self._scheme}://{socket.getfqdn() if self.host in EVERYWHERE else self.host}:{self.port}"

    @property
    def _scheme(self) -> str:
        return "mqtt" if self.tls is None else "mqtts"

    def command(self) -> list[str]:
        """What is run."""
        if self.kind == "amqtt":
            files = (
                [str(p) for p in (self.tls.ca, self.tls.cert, self.tls.key, self.tls.crl)] if self.tls else []
            )
            return [
                sys.executable,
                "-m",
                "rankfleet.coordinator.broker.amqtt_broker",
                self.host,
                str(self.port),
                self.fleet,
                *files,
            ]
        conf, rules = self.home / "mosquitto.conf", self.home / "mosquitto.acl"
        if self.tls:
            write_atomic(rules, access.mosquitto_rules(self.fleet).encode(), 0o600)
        write_atomic(conf, access.mosquitto_config(self.port, self.host, self.tls, rules).encode())
        return [mosquitto() or "mosquitto", "-c", str(conf)]

    async def start(self) -> None:
        """Start the child and wait until it listens. Raises ConfigError where it cannot."""
        await asyncio.to_thread(self._end_orphan)
        await self._port_is_free()
        self._task = asyncio.create_task(self._keep(), name="broker")
        for _ in range(200):
            await asyncio.sleep(0.05)
            if await self.listening():
                return
            if self.restarts > 3:
                break
        await self.stop()
        raise ConfigError(
            f"the {self.kind} broker does not listen on {self.host}:{self.port}", "its own log says why"
        )

    def _end_orphan(self) -> None:
        """The broker of a coordinator that was killed still runs, and holds the port: it is known by our
        folder in its command."""
        import psutil

        with contextlib.suppress(OSError, ValueError, psutil.Error):
            process = psutil.Process(int((self.home / "broker.pid").read_text()))
            if str(self.home) in " ".join(process.cmdline()):
                process.kill()
                process.wait(5)

    async def _port_is_free(self) -> None:
        """Asked before the child is started: somebody else who answers on the port would look like it."""
        for _ in range(20):
            with socket.socket(socket.AF_INET6 if ":" in self.host else socket.AF_INET) as probe:
                if sys.platform != "win32":
                    probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                try:
                    probe.bind((self.host, self.port))
                except OSError as error:
                    reason = error
                else:
                    return
            # The broker of a coordinator that was killed may need a moment to notice.
            await asyncio.sleep(0.1)
        raise ConfigError(
            f"no broker can listen on {self.host}:{self.port}: {reason.strerror}",
            "is the port in use? set `broker.port` to another one, or 0",
        )

    async def listening(self) -> bool:
        """Does somebody answer on the port, while our child lives?"""
        if self.process is None or self.process.returncode is not None:
            return False
        with contextlib.suppress(OSError):
            _, writer = await asyncio.open_connection(
                LOOPBACK if self.host in EVERYWHERE else self.host, self.port
            )
            writer.close()
            return True
        return False

    def cut(self) -> None:
        """End it, and with it every connection; it is started again at once, and reads anew who was
        revoked."""
        if self.process is not None and self.process.returncode is None:
            self._cut = True
            with contextlib.suppress(ProcessLookupError):
                self.process.kill()

    async def _keep(self) -> None:
        while True:
            self.process = await asyncio.create_subprocess_exec(
                *self.command(), stdout=asyncio.subprocess.DEVNULL, stderr=asyncio.subprocess.DEVNULL
            )
            write_atomic(self.home / "broker.pid", str(self.process.pid).encode(), durable=False)
            code = await self.process.wait()
            if self._cut:
                self._cut = False
                continue
            self.restarts += 1
            log.warning("the %s broker ended with code %s and is started again", self.kind, code)
            await asyncio.sleep(min(5.0, 0.2 * self.restarts))

    async def stop(self) -> None:
        """End the child."""
        if self._task:
            self._task.cancel()
        if self.process and self.process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                self.process.terminate()
            await self.process.wait()
