"""What is most often set up wrong on a device, each with what to do."""

import importlib.util
import json
import platform
import shutil
import socket
import ssl
import time
from pathlib import Path

from rankfleet.federated.errors import RankfleetError
from rankfleet.federated.program.cli import Finding, finding
from rankfleet.federated.program.loader import load
from rankfleet.federated.transport.address import parse_url

from .config import AgentConfig
from .machine import probe
from .trust import certificate, identity

CUDA_HOME = Path("/usr/local")


def examine(path: Path) -> list[Finding]:
    """All findings; later checks need what earlier ones found."""
    try:
        config = load(path, AgentConfig)
    except RankfleetError as error:
        return [finding("config", "error", str(error.args[0]), error.hint)]
    found = [finding("config", "ok", str(path))]
    found += [_state(config.home), _enrolled(config.home), _profile(config), _torch(), _gpu()]
    found += [_dataset(n, d.path) for n, d in config.datasets.items()] or [
        finding(
            "data",
            "error",
            "no dataset is mapped, so no job can run here",
            "add `datasets` to the agent's YAML",
        )
    ]
    found += [_model(n, p) for n, p in config.models.items()] or [
        finding(
            "model",
            "error",
            "no base model is named, so no job can run here",
            "add `models` to the agent's YAML",
        )
    ]
    if (known := certificate.facts(config.home)) is not None:
        found.append(_certificate(known))
    return [*found, _broker(config), *_running(config.home)]


def _running(home: Path) -> list[Finding]:
    """What a running service found wrong itself, but for what was looked at above."""
    try:
        said = json.loads((home / "status.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return []
    if time.time() - float(said.get("at", 0)) > 120 or said.get("state") == "stopped":
        return [
            finding(
                "service",
                "warning",
                "the service does not run",
                "systemctl start edge-agent, or edge-agent run",
            )
        ]
    seen = ("disk-low", "broker-away", "certificate-ends", "clock-wrong", "data-missing")
    return [
        finding(c["code"], c["severity"], c["text"], c["do"])
        for c in said.get("conditions", [])
        if c["code"] not in seen
    ]


def _state(home: Path) -> Finding:
    if not home.exists():
        return finding("state", "error", f"{home} does not exist", "edge-agent enroll makes it")
    if home.stat().st_mode & 0o077 and platform.system() != "Windows":
        return finding("state", "error", f"{home} can be read by others", f"chmod 700 {home}")
    free = shutil.disk_usage(home).free / 1e6
    return finding(
        "state",
        "ok" if free > 500 else "error",
        f"{home}, {free:,.0f} MB free",
        "" if free > 500 else "make room",
    )


def _enrolled(home: Path) -> Finding:
    try:
        who = identity.load(home)
    except RankfleetError as error:
        return finding("identity", "error", str(error.args[0]), error.hint)
    key = home / "device.key"
    if key.exists() and key.stat().st_mode & 0o077 and platform.system() != "Windows":
        return finding("identity", "error", f"{key} can be read by others", f"chmod 600 {key}")
    return finding("identity", "ok", f"`{who.device}` in fleet `{who.fleet}`")


def _profile(config: AgentConfig) -> Finding:
    try:
        profile = probe.profile(config)
    except KeyError:
        return finding("profile", "error", f"profile `{config.profile}` is not known", "use `auto`")
    return finding(
        "profile",
        "ok",
        f"{profile.title}, {profile.budget_mb:.0f} MB for the model, {profile.threads} threads",
    )


def _torch() -> Finding:
    if importlib.util.find_spec("torch") is None:
        return finding("torch", "error", "torch is not installed in this environment", "make install")
    missing = [
        m for m in ("transformers", "safetensors", "cryptography") if importlib.util.find_spec(m) is None
    ]
    return finding(
        "torch", "error" if missing else "ok", f"missing: {', '.join(missing)}" if missing else "installed"
    )


def _gpu() -> Finding:
    release = platform.release()
    if "tegra" in release and not list(CUDA_HOME.glob("cuda*")):
        return finding(
            "gpu",
            "error",
            "a Jetson without CUDA: training would run on the CPU",
            "install JetPack's CUDA and NVIDIA's torch",
        )
    return finding("gpu", "ok", ", ".join(probe.gpus()) or "none; trains on the CPU")


def _dataset(name: str, path: str) -> Finding:
    if path.startswith("hub:") or Path(path).exists():
        return finding("data", "ok", f"`{name}`: {path}")
    return finding("data", "error", f"`{name}`: {path} does not exist", f"correct `datasets.{name}.path`")


def _model(name: str, path: str) -> Finding:
    if path == "coordinator" or path.startswith("hub:"):
        return finding(
            "model",
            "ok",
            f"`{name}`: fetched from {'the coordinator' if path == 'coordinator' else path} when a job "
            "needs it",
        )
    folder = Path(path)
    if not (folder / "config.json").exists() or not list(folder.glob("*.safetensors")):
        return finding(
            "model",
            "error",
            f"`{name}`: {path} lacks config.json or *.safetensors",
            "copy the model there; pickled weights are not loaded",
        )
    return finding("model", "ok", f"`{name}`: {path}")


def _certificate(known: certificate.Facts) -> Finding:
    until, now = time.strftime("%Y-%m-%d", time.localtime(known.ends)), time.time()
    if now < known.begins:
        return finding(
            "certificate",
            "error",
            f"the clock says {time.strftime('%Y-%m-%d')}: earlier than the certificate",
            "set the clock",
        )
    if now > known.ends:
        return finding(
            "certificate",
            "error",
            f"it ended on {until}",
            "edge-agent run renews it; else edge-agent enroll --again TOKEN",
        )
    if now > known.renew_at() + 86_400:
        return finding(
            "certificate",
            "warning",
            f"it ends on {until} and is not renewed",
            f"is {known.door} reachable from here?",
        )
    return finding("certificate", "ok", f"until {until}, renewed in time")


def _broker(config: AgentConfig) -> Finding:
    try:
        url = parse_url(config.link.broker or identity.load(config.home).broker)
        tls = certificate.context(config.home) if url.scheme == "mqtts" and not config.link.ca_file else None
    except RankfleetError:
        return finding("broker", "error", "no broker is known before enrolment", "edge-agent enroll TOKEN")
    try:
        with socket.create_connection((url.host, url.port), 5) as plain:
            if tls is not None:
                with tls.wrap_socket(plain, server_hostname=url.host):
                    return finding("broker", "ok", f"{url.host}:{url.port} answers, and is of this fleet")
        return finding("broker", "ok", f"{url.host}:{url.port} answers")
    except ssl.SSLError as error:
        return finding(
            "broker",
            "error",
            f"{url.host}:{url.port}: TLS: {error}",
            "is it the broker of this fleet, under a name it knows?",
        )
    except OSError as error:
        return finding(
            "broker",
            "error",
            f"{url.host}:{url.port}: {error}",
            "is the coordinator running, and no firewall between?",
        )
