"""What is most often set up wrong on the coordinator's side, each with what to do."""

import shutil
from pathlib import Path

from rankfleet.federated.errors import RankfleetError
from rankfleet.federated.program.cli import Finding, finding
from rankfleet.federated.program.loader import load

from ..broker.child import mosquitto
from ..config import LOOPBACK, CoordinatorConfig
from .client import Client


def examine(path: Path) -> list[Finding]:
    """All findings."""
    try:
        config = load(path, CoordinatorConfig)
    except RankfleetError as error:
        return [finding("config", "error", str(error.args[0]), error.hint)]
    found = [finding("config", "ok", str(path)), _disk(config.home), _broker(config)]
    found += [_model(n, Path(p)) for n, p in config.models.items()] or [
        finding(
            "model",
            "error",
            "no base model is named, so no job can run",
            "add `models` to the coordinator's YAML",
        )
    ]
    return [*found, *_service(config.home)]


def _disk(home: Path) -> Finding:
    if not home.exists():
        return finding("data", "error", f"{home} does not exist", "coordinator serve makes it")
    free = shutil.disk_usage(home).free / 1e9
    return finding(
        "data", "ok" if free > 1 else "error", f"{home}, {free:.0f} GB free", "" if free > 1 else "make room"
    )


def _broker(config: CoordinatorConfig) -> Finding:
    if config.broker.url:
        return finding("broker", "ok", config.broker.url)
    if not config.mutual_tls and config.broker.host not in LOOPBACK:
        return finding(
            "broker",
            "error",
            f"the broker listens on {config.broker.host} without TLS",
            "leave `broker.tls` out",
        )
    if not mosquitto():
        return finding(
            "broker",
            "warning",
            "no Mosquitto; amqtt serves, at about a sixth of its speed",
            "apt install mosquitto",
        )
    return finding("broker", "ok", "Mosquitto, run by the coordinator")


def _model(name: str, folder: Path) -> Finding:
    if not (folder / "config.json").exists() or not list(folder.glob("*.safetensors")):
        return finding(
            "model", "error", f"`{name}`: {folder} lacks config.json or *.safetensors", "copy the model there"
        )
    return finding("model", "ok", f"`{name}`: {folder}")


def _service(home: Path) -> list[Finding]:
    try:
        client = Client(home)
        health = client.get("/health")
        devices = client.get("/devices")
    except RankfleetError as error:
        return [finding("service", "error", str(error.args[0]), error.hint)]
    found = [
        finding(
            "service",
            "ok" if health["ok"] else "error",
            f"runs; broker {health['broker']}" + (f": {health['problem']}" if not health["ok"] else ""),
        )
    ]
    found += [
        finding(c["code"], c["severity"], c["text"], c["do"])
        for c in health["conditions"]
        if c["code"] not in ("broker-away", "disk-low")
    ]
    quiet = [d["device"] for d in devices if d["state"] == "invited"]
    if quiet:
        found.append(
            finding(
                "devices",
                "warning",
                f"invited, never heard of: {', '.join(quiet)}",
                "edge-agent enroll TOKEN, then run",
            )
        )
    return found
