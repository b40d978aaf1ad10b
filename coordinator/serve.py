"""`coordinator serve`: authority, broker, connection, service and API, put together and taken apart again."""

import asyncio
import signal
import ssl
import sys

from rankfleet.federated.errors import ConfigError
from rankfleet.federated.program.metrics import MetricsServer
from rankfleet.federated.program.notify import alive, notify
from rankfleet.federated.program.platform_lock import hold
from rankfleet.federated.transport.address import parse_url, tls_context, without_password
from rankfleet.federated.transport.mqtt import MqttBus
from rankfleet.federated.transport.topics import checked

from . import health
from .broker.access import Files
from .broker.child import BrokerChild
from .config import LOOPBACK, CoordinatorConfig
from .fleet import renewal
from .fleet.authority import Authority, own_names
from .service import Service
from .web.app import Api


def refuse_open_link(config: CoordinatorConfig) -> None:
    """Raises ConfigError where MQTT would cross a network unencrypted."""
    b = config.broker
    if b.url:
        url = parse_url(b.url)
        bare, where = url.scheme in ("mqtt", "ws") and url.host not in LOOPBACK, f"{url.host}:{url.port}"
    else:
        bare, where = not config.mutual_tls and b.host not in LOOPBACK, b.host
    if bare:
        raise ConfigError(
            f"the broker at {where} would be used without TLS over a network",
            "leave `broker.tls` out, give an `mqtts://` address, or serve --insecure on a network that you "
            "trust",
        )


def _ended() -> asyncio.Event:
    """Set by SIGTERM and SIGINT."""
    ended = asyncio.Event()
    if sys.platform != "win32":
        for name in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(name, ended.set)
    return ended


async def _own_broker(
    config: CoordinatorConfig, authority: Authority | None, names: list[str]
) -> BrokerChild | None:
    """The broker that the coordinator brings, listening; None where there is one at a `url`."""
    if config.broker.url:
        return None
    files = None
    if authority:
        authority.ensure_crl()
        files = Files(authority.ca, *authority.server(names), authority.crl)
    broker = BrokerChild(config.broker, config.home, config.fleet, files)
    await broker.start()
    return broker


def _link_tls(config: CoordinatorConfig, authority: Authority | None) -> ssl.SSLContext | None:
    """Towards the broker: what the YAML names, else our own certificate; None: the system's authorities."""
    b = config.broker
    if b.ca_file or b.cert_file:
        return tls_context(b.ca_file, b.cert_file, b.key_file)
    return tls_context(str(authority.ca), *map(str, authority.client())) if authority else None


async def _metrics(config: CoordinatorConfig, service: Service) -> MetricsServer:
    """Listens where the YAML says so."""
    server = MetricsServer(lambda: health.exposition(service))
    if config.metrics.port is not None:
        await server.start(config.metrics.host, config.metrics.port)
        print(f"metrics at http://{config.metrics.host}:{server.port}/metrics", flush=True)
    return server


async def serve(config: CoordinatorConfig, insecure: bool = False) -> None:
    """Until SIGTERM. Raises ConfigError where it cannot begin."""
    if not insecure:
        refuse_open_link(config)
    checked(config.fleet, "fleet")
    hold(config.home, "coordinator")
    ended = _ended()
    b, authority = config.broker, Authority(config.home, config.fleet) if config.mutual_tls else None
    names = own_names(b.host, parse_url(b.advertise).host if b.advertise else "") if authority else []
    broker = await _own_broker(config, authority, names)
    try:
        await _serve(config, authority, names, broker, ended)
    finally:
        if broker:
            await broker.stop()


async def _serve(
    config: CoordinatorConfig,
    authority: Authority | None,
    names: list[str],
    broker: BrokerChild | None,
    ended: asyncio.Event,
) -> None:
    """Everything behind the broker, until `ended`."""
    b = config.broker
    url = b.url or (broker.url if broker else "")
    public = b.advertise or b.url or (broker.public_url if broker else "")
    tls = _link_tls(config, authority)
    bus = MqttBus(url, f"rf-{config.fleet}-coordinator", tls=tls, proxy=b.proxy)
    service = Service(config, bus, public, authority, broker.cut if broker else None)
    await service.start()
    runner = await Api(service).start(config.home, config.api_port)
    metrics = await _metrics(config, service)
    print(
        f"coordinator of fleet `{config.fleet}` runs; broker "
        f"{without_password(url)}{f' ({broker.kind})' if broker else ''}",
        flush=True,
    )
    tasks = [asyncio.create_task(alive(service.in_words), name="notify")]
    if authority:

        def changed() -> None:
            service.models.reload()
            service.jobs.source_changed()
            if broker:
                broker.cut()

        tasks.append(asyncio.create_task(renewal.keep(authority, names, tls, changed), name="renewal"))
    try:
        await ended.wait()
    finally:
        for task in tasks:
            task.cancel()
        notify("STOPPING=1")
        await runner.cleanup()
        await metrics.stop()
        await service.stop()
