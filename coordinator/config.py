"""The coordinator's YAML. Every key has a default."""

from pathlib import Path
from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from rankfleet.federated.program.metrics import Metrics

LOOPBACK = ("127.0.0.1", "localhost", "::1")


class Broker(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Where MQTT lives."""

    url: str = ""
    """Address of a broker; empty: the coordinator runs one itself (Mosquitto where it is installed, else
    amqtt)."""
    kind: str = "auto"
    """`auto`, `mosquitto` or `amqtt`, for the broker that it runs."""
    host: str = "127.0.0.1"
    port: Annotated[int, Meta(ge=0, le=65535)] | None = None
    """Port of its own broker; 0 takes a free one; left out: 8883 with TLS, else 1883."""
    tls: bool | None = None
    """Mutual TLS with certificates of the fleet's own authority. Left out: on its own broker, unless that
    listens on loopback alone. True with a `url`: devices get certificates for that broker too
    (`coordinator broker config`)."""
    ca_file: str = ""
    cert_file: str = ""
    key_file: str = ""
    """TLS to a broker at `mqtts://` or `wss://`: its authority, and a client certificate; empty: the
    system's authorities, none."""
    proxy: str = ""
    """`http://user:password@host:port` or `socks5://…` on the way to `url`."""
    advertise: str = ""
    """Address that claim tokens carry; empty: `url`, or this machine's name where the broker listens on
    all addresses."""


class Https(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """HTTPS server: certificates for devices where the link has TLS of ours, and base models. It runs if
    one of them is wanted."""

    models: bool = False
    """Serve base models, for devices whose YAML says `models: {NAME: coordinator}`."""
    host: str = ""
    """Empty: where the broker listens; with certificates for a broker elsewhere, everywhere."""
    port: Annotated[int, Meta(ge=0, le=65535)] | None = None
    """0 takes a free one; left out: 8443 with certificates, since devices come back to it to renew theirs,
    else a free one."""
    advertise: str = ""
    """Address that devices are told; empty: this machine's name where it listens on all addresses."""
    cert_file: str = ""
    key_file: str = ""
    """PEM; empty: a certificate is made, and devices pin it."""


class Enrolment(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How devices join."""

    claim_days: Annotated[float, Meta(gt=0)] = 7.0
    """A claim token that was not used for so long is void."""
    certificate_days: Annotated[float, Meta(gt=0)] = 90.0
    """Life of a device's certificate; renewed when a third of it is left."""


class Limits(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What may be under way at once, and how large things may be."""

    packet_bytes: Annotated[int, Meta(ge=256, le=120_000)] = 60_000
    """Pieces that devices fetch. On a link that is cut, half a piece is lost each time."""
    outstanding_mb: Annotated[float, Meta(gt=0)] = 64.0
    outstanding_chunks: Annotated[int, Meta(ge=1)] = 400
    update_mb: Annotated[float, Meta(gt=0)] = 512.0
    keep_free_mb: Annotated[float, Meta(ge=0)] = 200.0
    """No update is granted while less is free in the data directory: devices keep theirs until there is
    room."""
    nudge_s: Annotated[float, Meta(gt=0)] = 20.0
    """A device that says nothing about its assignment for so long is sent it again, then after twice as
    long."""
    messages_per_s: Annotated[float, Meta(gt=0)] = 10.0
    """What one device may say, pieces that it was granted apart; a device that says more is slowed down,
    then suspended."""
    burst: Annotated[int, Meta(ge=10)] = 300
    """Messages that a device may have saved up."""
    gather_ms: Annotated[float, Meta(ge=0)] = 50.0
    """How long wants for the same blob are gathered before its pieces are published."""


class Oidc(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Operators who log in at an OpenID Connect issuer. Empty issuer: keys alone."""

    issuer: str = ""
    audience: str = "rankfleet"
    claim: str = "roles"
    """Claim that holds `rankfleet-viewer`, `rankfleet-operator` or `rankfleet-admin`."""


class CoordinatorConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Everything an operator can set."""

    data_dir: str = "/var/lib/rankfleet"
    fleet: str = "main"
    database: str = ""
    """SQLAlchemy URL; empty: SQLite in the data directory."""
    broker: Broker = Broker()
    api_port: Annotated[int, Meta(ge=0, le=65535)] = 0
    """Port of the HTTP API on loopback; 0 takes a free one, which is written to `api.json` with its token."""
    models: dict[str, str] = {}
    """Name of a base model → folder. The coordinator reads shapes from it, and weights to order channels
    for pruning."""
    https: Https = Https()
    enrolment: Enrolment = Enrolment()
    limits: Limits = Limits()
    oidc: Oidc = Oidc()
    metrics: Metrics = Metrics()
    log: Literal["text", "json"] = "text"
    """Lines for people, or one JSON object a line."""

    @property
    def mutual_tls(self) -> bool:
        """Do devices get certificates?"""
        if self.broker.tls is None:
            return not self.broker.url and self.broker.host not in LOOPBACK
        return self.broker.tls

    @property
    def home(self) -> Path:
        """The data directory."""
        return Path(self.data_dir)
