"""Who may do what, as brokers are told it; the authority's certificates; where devices find the door; no
open link over a network."""

import asyncio
import datetime
from pathlib import Path
from typing import Any

import pytest

from rankfleet.coordinator.broker.access import Files, allowed, emqx_config, emqx_rules, mosquitto_config
from rankfleet.coordinator.broker.child import BrokerChild, mosquitto
from rankfleet.coordinator.broker.own_broker import write
from rankfleet.coordinator.config import Broker, CoordinatorConfig
from rankfleet.coordinator.fleet.authority import Authority, own_names
from rankfleet.coordinator.serve import refuse_open_link
from rankfleet.federated.errors import ConfigError, WireError
from rankfleet.federated.transport.address import tls_context
from rankfleet.federated.transport.mqtt import MqttBus


async def test_signing_requests_that_are_none(tmp_path: Path) -> None:
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec, rsa

    authority = Authority(tmp_path, "main")
    subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "coordinator")])
    builder = x509.CertificateSigningRequestBuilder().subject_name(subject)
    weak = (
        builder.sign(rsa.generate_private_key(65537, 2048), hashes.SHA256())
        .public_bytes(serialization.Encoding.PEM)
        .decode()
    )
    for text in ("", "hello", weak, weak[:-80] + weak[-60:], "x" * 9000):
        with pytest.raises(WireError):
            authority.sign_request(text, "d0")
    good = (
        builder.sign(ec.generate_private_key(ec.SECP256R1()), hashes.SHA256())
        .public_bytes(serialization.Encoding.PEM)
        .decode()
    )
    made = x509.load_pem_x509_certificate(authority.sign_request(good, "d0").pem.encode())
    assert made.subject.get_attributes_for_oid(x509.NameOID.COMMON_NAME)[0].value == "d0", (
        "what the request asks for is not believed"
    )
    assert not made.extensions.get_extension_for_class(x509.BasicConstraints).value.ca


@pytest.mark.parametrize(
    ("user", "topic", "access", "may"),
    [
        ("d0", "rf/main/dev/d0/up", "write", True),
        ("d0", "rf/main/dev/d0/chunk", "write", True),
        ("d0", "rf/main/dev/d0/job", "read", True),
        ("d0", "rf/main/blob/abc", "read", True),
        ("d0", "rf/main/blob/abc", "write", False),
        ("d0", "rf/main/blob/+", "read", False),
        ("d0", "rf/main/dev/d0/job", "write", False),
        ("d0", "rf/main/dev/d0/up", "read", False),
        ("d0", "rf/main/dev/d1/up", "write", False),
        ("d0", "rf/main/dev/+/down", "read", False),
        ("d0", "rf/main/#", "read", False),
        ("d0", "rf/other/dev/d0/up", "write", False),
        ("", "rf/main/dev//up", "write", False),
        ("+", "rf/main/dev/+/job", "read", False),
        ("coordinator", "rf/main/dev/+/up", "read", True),
        ("coordinator", "rf/other/dev/d0/job", "write", False),
    ],
)
def test_who_may_what(user: str, topic: str, access: Any, may: bool) -> None:
    assert allowed("main", user, topic, access) == may


@pytest.mark.parametrize(
    ("broker", "bare"),
    [
        ({}, False),
        ({"host": "0.0.0.0"}, False),
        ({"host": "0.0.0.0", "tls": False}, True),
        ({"url": "mqtt://broker.example"}, True),
        ({"url": "ws://10.0.0.7/mqtt"}, True),
        ({"url": "mqtts://broker.example"}, False),
        ({"url": "mqtt://localhost"}, False),
    ],
)
def test_an_open_link_over_a_network_is_refused(broker: dict[str, Any], bare: bool) -> None:
    config = CoordinatorConfig(broker=Broker(**broker))
    if bare:
        with pytest.raises(ConfigError, match="without TLS over a network"):
            refuse_open_link(config)
    else:
        refuse_open_link(config)


def test_names_of_a_server_are_added_and_its_key_stays(tmp_path: Path) -> None:
    from cryptography import x509

    authority = Authority(tmp_path, "main")
    cert, key = authority.server(["a.example", "10.1.2.3"])
    before = key.read_bytes(), cert.read_bytes()
    assert authority.server(["a.example"])[0].read_bytes() == before[1]
    authority.server(["b.example"])
    assert key.read_bytes() == before[0]
    made = x509.load_pem_x509_certificate(cert.read_bytes())
    names = made.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert set(names.get_values_for_type(x509.DNSName)) == {"a.example", "b.example"}
    assert made.not_valid_after_utc - datetime.datetime.now(datetime.timezone.utc) < datetime.timedelta(
        days=366
    )
    (tmp_path / "ca" / "ca.key").write_bytes(b"rubbish")
    with pytest.raises(ConfigError, match="cannot be read"):
        Authority(tmp_path, "main")


@pytest.mark.skipif(mosquitto() is None, reason="Mosquitto is not installed")
async def test_a_broker_elsewhere_from_our_files(tmp_path: Path) -> None:
    authority = Authority(tmp_path / "c", "main")
    written = write(authority, "mosquitto", tmp_path / "broker", 0, ["broker.example"])
    assert {p.name for p in written} == {
        "broker.key",
        "broker.pem",
        "ca.pem",
        "crl.pem",
        "mosquitto.conf",
        "rules.acl",
    }
    child = BrokerChild(Broker(kind="mosquitto", port=0), tmp_path)
    folder = tmp_path / "broker"
    files = Files(folder / "ca.pem", folder / "broker.pem", folder / "broker.key", folder / "crl.pem")
    (folder / "mosquitto.conf").write_text(
        mosquitto_config(child.port, "127.0.0.1", files, folder / "rules.acl")
    )
    process = await asyncio.create_subprocess_exec(mosquitto() or "", "-c", str(folder / "mosquitto.conf"))
    bus = MqttBus(
        f"mqtts://127.0.0.1:{child.port}",
        "c",
        tls=tls_context(str(authority.ca), *map(str, authority.client())),
    )
    await bus.start()
    await asyncio.wait_for(bus.connected.wait(), 20)
    await bus.stop()
    process.terminate()
    await process.wait()


def test_the_same_rules_for_emqx(tmp_path: Path) -> None:
    authority = Authority(tmp_path / "c", "main")
    written = write(authority, "emqx", tmp_path / "broker", 8883, own_names())
    assert {p.name for p in written} == {
        "acl.conf",
        "broker.key",
        "broker.pem",
        "ca.pem",
        "crl.pem",
        "emqx.conf",
    }
    rules = emqx_rules("main")
    assert '"rf/main/dev/${username}/up"' in rules
    assert rules.strip().endswith("{deny, all}.")
    text = emqx_config(8883, Files(*(Path(n) for n in ("ca", "cert", "key", "crl"))), Path("acl"))
    assert "fail_if_no_peer_cert = true" in text
    assert "no_match = deny" in text
    assert text.count("{") == text.count("}")


@pytest.mark.parametrize(
    ("broker", "https", "certificates", "where"),
    [
        ({}, {}, False, ("127.0.0.1", 0)),
        ({"host": "0.0.0.0"}, {}, True, ("0.0.0.0", 8443)),
        ({"host": "10.0.0.1"}, {"port": 9000}, True, ("10.0.0.1", 9000)),
        ({"url": "mqtts://b.example", "tls": True}, {}, True, ("0.0.0.0", 8443)),
        ({"url": "mqtts://b.example", "tls": True}, {"host": "10.0.0.2", "port": 0}, True, ("10.0.0.2", 0)),
        ({"url": "mqtts://b.example"}, {"models": True}, False, ("127.0.0.1", 0)),
    ],
)
async def test_where_devices_find_the_door(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    broker: dict[str, Any],
    https: dict[str, Any],
    certificates: bool,
    where: tuple[str, int],
) -> None:
    from aiohttp import web

    from rankfleet.coordinator.config import Https
    from rankfleet.coordinator.service import Service
    from rankfleet.federated.transport.memory import MemoryBroker, MemoryBus

    asked: list[tuple[str, int]] = []

    class Site(web.TCPSite):
        def __init__(self, runner: Any, host: str, port: int, **more: Any) -> None:
            asked.append((host, port))
            super().__init__(runner, "127.0.0.1", 0, **more)

    monkeypatch.setattr(web, "TCPSite", Site)
    config = CoordinatorConfig(
        data_dir=str(tmp_path), broker=Broker(**broker), https=Https(**{"models": True, **https})
    )
    assert config.mutual_tls == certificates
    authority = Authority(tmp_path, "main") if certificates else None
    service = Service(config, MemoryBus(MemoryBroker()), "mqtts://x", authority)
    await service.start()
    assert asked == [where]
    await service.stop()
