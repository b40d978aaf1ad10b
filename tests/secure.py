"""The small world over a real broker with mutual TLS: certificates of the fleet's own authority, from real
enrolment over HTTPS."""

import asyncio
import ssl
from pathlib import Path
from typing import Any

from rankfleet.coordinator.broker.access import Files
from rankfleet.coordinator.broker.child import BrokerChild
from rankfleet.coordinator.config import Broker, CoordinatorConfig, Enrolment, Https, Limits
from rankfleet.coordinator.fleet.authority import Authority, own_names
from rankfleet.coordinator.service import Service
from rankfleet.edge_agent.trust import certificate, identity
from rankfleet.federated.transport.address import tls_context
from rankfleet.federated.transport.mqtt import MqttBus

from .world import World


class SecureWorld(World):
    """`kind` is the broker; everything else as in `World`."""

    def __init__(
        self, home: Path, model: Path, kind: str, *, enrolment: Enrolment | None = None, devices: int = 2
    ) -> None:
        super().__init__(home, model, devices=devices)
        data = home / "coordinator"
        data.mkdir()
        self.authority = Authority(data, "main")
        self.authority.ensure_crl()
        files = Files(self.authority.ca, *self.authority.server(own_names()), self.authority.crl)
        self.config = CoordinatorConfig(
            data_dir=str(data),
            broker=Broker(kind=kind, port=0, tls=True),
            https=Https(port=0, models=True),
            models={"tiny": str(model)},
            enrolment=enrolment or Enrolment(),
            limits=Limits(packet_bytes=self.packet, gather_ms=1, nudge_s=0.5),
        )
        self.child = BrokerChild(self.config.broker, data, "main", files)

    async def __aenter__(self) -> "SecureWorld":
        await self.child.start()
        await self.start_coordinator()
        for name in self.names:
            await self.join(name)
        await self.until(lambda: all(d["state"] == "enrolled" for d in self.coordinator.devices.table()))
        return self

    async def __aexit__(self, *error: object) -> None:
        await super().__aexit__(*error)
        await self.child.stop()

    async def join(self, name: str) -> None:
        await self.enrolled(self.coordinator.invite(name), name)
        await self.start_agent(name)

    async def enrolled(self, token: str, name: str, **options: Any) -> None:
        """The device's side blocks; the coordinator's runs in this loop."""
        await asyncio.to_thread(identity.enroll, token, self.home / name, **options)

    async def start_coordinator(self) -> None:
        tls = tls_context(str(self.authority.ca), *map(str, self.authority.client()))
        bus = MqttBus(self.child.url, "rf-main-coordinator", tls=tls)
        self.service = Service(self.config, bus, self.child.url, self.authority, self.child.cut)
        await self.service.start()
        await self.until(bus.connected.is_set)

    def bus(self, name: str) -> Any:
        return MqttBus(self.child.url, f"rf-main-{name}", tls=certificate.context(self.home / name))

    def stranger(self, tls: ssl.SSLContext, name: str = "stranger") -> MqttBus:
        """Some client of the broker."""
        return MqttBus(self.child.url, name, tls=tls)

    async def child_restart(self) -> None:
        """Every connection is cut; the broker comes back."""
        agent_buses = [a.bus for a, _ in self.agents.values()]
        self.child.cut()
        await self.until(lambda: not any(b.connected.is_set() for b in agent_buses))
