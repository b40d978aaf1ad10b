"""The set-up mistakes that are most likely on a device: each is found, and what to do stands beside it."""

import json
import ssl
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from rankfleet.coordinator.broker.child import free_port
from rankfleet.edge_agent import doctor
from rankfleet.edge_agent.doctor import examine
from rankfleet.edge_agent.trust import certificate, identity
from rankfleet.federated.trust.claim import Claim, write_claim


class Setup:
    """A device that is set up well, apart from the broker, which is not there."""

    def __init__(self, home: Path, model: Path) -> None:
        self.home = home / "state"
        identity.enroll(
            write_claim(Claim("main", "d0", f"mqtt://127.0.0.1:{free_port()}", b"s" * 32, b"k" * 32)),
            self.home,
        )
        (home / "data.jsonl").write_text("{}")
        self.yaml: dict[str, Any] = {
            "state_dir": str(self.home), "profile": "laptop-x86-16gb", "models": {"tiny": str(model)},
            "datasets": {"words": {"path": str(home / "data.jsonl")}},
        }  # fmt: skip
        self.path = home / "agent.yaml"

    def findings(self) -> dict[str, list[dict[str, str]]]:
        self.path.write_text(yaml.safe_dump(self.yaml))
        found: dict[str, list[dict[str, str]]] = {}
        for f in examine(self.path):
            if f["state"] != "ok":
                found.setdefault(f["check"], []).append(f)
        return found


@pytest.fixture
def setup(tmp_path: Path, tiny: Path) -> Setup:
    return Setup(tmp_path, tiny)


def facts(**changes: float) -> certificate.Facts:
    now = time.time()
    times = {"begins": now - 86_400, "ends": now + 90 * 86_400, **changes}
    return certificate.Facts(door="https://127.0.0.1:1", pin=b"", **times)  # type: ignore[arg-type]


MISTAKES: dict[str, tuple[Callable[[Setup, pytest.MonkeyPatch], Any], str, str]] = {
    "a typing error in the YAML": (lambda s, m: s.yaml.update(dataset={}), "config", "unknown key"),
    "not enrolled": (lambda s, m: (s.home / "identity.json").unlink(), "identity", "not enrolled"),
    "others can read the state": (lambda s, m: s.home.chmod(0o755), "state", "can be read by others"),
    "others can read the "
    "key": (lambda s, m: (s.home / "device.key").chmod(0o644), "identity", "can be read by others"),
    "a profile that there is not": (lambda s, m: s.yaml.update(profile="toaster"), "profile", "not known"),
    "no dataset": (lambda s, m: s.yaml.update(datasets={}), "data", "no dataset is mapped"),
    "a dataset that is "
    "elsewhere": (lambda s, m: s.yaml["datasets"]["words"].update(path="/nowhere"), "data", "does not exist"),
    "no model": (lambda s, m: s.yaml.update(models={}), "model", "no base model is named"),
    "pickled weights": (lambda s, m: s.yaml["models"].update(tiny=str(s.home)), "model",
    "lacks config.json or"),
    "the disk is full": (
        lambda s, m: m.setattr(doctor.shutil, "disk_usage", lambda p: type("U", (), {"free": 10**6})()),
        "state", "1 MB free",
    ),
    "torch is not installed": (
        lambda s, m: m.setattr(doctor.importlib.util, "find_spec", lambda n: None if n == "torch" else n),
        "torch", "not installed",
    ),
    "a Jetson without CUDA": (lambda s, m: _jetson(s, m), "gpu", "without CUDA"),
    "the clock is wrong": (lambda s, m: m.setattr(certificate, "facts", _too_early), "certificate",
    "earlier than the certificate"),
    "the certificate has ended": (
        lambda s, m: m.setattr(certificate, "facts", lambda home: facts(ends=time.time() - 1)), "certificate",
        "it ended on",
    ),
    "the broker does not answer": (lambda s, m: None, "broker", "Connection refused"),
    "the broker is another one": (
        lambda s, m: m.setattr(doctor.socket, "create_connection", _other_broker), "broker", "TLS",
    ),
    "the service does not run": (
        lambda s, m: (s.home / "status.json").write_text(json.dumps({"at": 0.0, "state": "idle"})), "service",
        "does not run",
    ),
}  # fmt: skip


def _jetson(setup: Setup, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(doctor.platform, "release", lambda: "5.15.136-tegra")
    patch.setattr(doctor, "CUDA_HOME", setup.home / "nothing")


def _too_early(home: Path) -> certificate.Facts:
    return facts(begins=time.time() + 9e6)


def _other_broker(*args: Any) -> Any:
    raise ssl.SSLError("certificate verify failed")


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_found(setup: Setup, mistake: str, monkeypatch: pytest.MonkeyPatch) -> None:
    before = setup.findings()
    assert set(before) <= {"broker"}
    make, check, text = MISTAKES[mistake]
    make(setup, monkeypatch)
    found = setup.findings()
    assert check in found, found
    assert any(text in f["text"] for f in found[check]), found[check]
    assert all(f["do"] for f in found[check])
    assert len(MISTAKES) >= 12
