"""What is shipped beside the code: default YAML that says the truth, units that systemd accepts, signs of
life."""

import asyncio
import plistlib
import re
import shutil
import socket
import subprocess
from pathlib import Path
from typing import Any

import msgspec
import pytest
import yaml

from rankfleet.coordinator.config import CoordinatorConfig
from rankfleet.edge_agent.config import AgentConfig
from rankfleet.federated.program.loader import load
from rankfleet.federated.program.notify import alive, notify, watchdog_s

PACKAGING = Path(__file__).parent.parent / "packaging"
UNITS = sorted((PACKAGING / "systemd").glob("*.service"))


@pytest.mark.parametrize(("name", "kind"), [("coordinator", CoordinatorConfig), ("agent", AgentConfig)])
def test_the_default_yaml_has_every_key_with_its_default(name: str, kind: Any) -> None:
    path = PACKAGING / "config" / f"{name}.yaml"
    assert load(path, kind) == kind()

    def keys(tree: Any) -> Any:
        return {k: keys(v) for k, v in tree.items()} if isinstance(tree, dict) else None

    assert keys(yaml.safe_load(path.read_text())) == keys(msgspec.to_builtins(kind()))


def settings(unit: Path) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for key, value in re.findall(r"^(\w+)=(.*)$", unit.read_text(), re.MULTILINE):
        found.setdefault(key, []).append(value)
    return found


@pytest.mark.parametrize("unit", UNITS, ids=lambda u: u.name)
def test_units(unit: Path) -> None:
    found = settings(unit)
    for key, value in {
        "Type": "notify", "Restart": "always", "NoNewPrivileges": "yes", "ProtectSystem": "strict",
        "CapabilityBoundingSet": "",
        "OOMPolicy": "continue", "StateDirectoryMode": "0700", "UMask": "0077",
    }.items():  # fmt: skip
        assert found[key] == [value]
    assert int(found["WatchdogSec"][0]) >= 30
    assert found["User"][0] != "root"


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd is not installed")
@pytest.mark.parametrize("unit", UNITS, ids=lambda u: u.name)
def test_exposure_as_systemd_sees_it(unit: Path) -> None:
    done = subprocess.run(
        ["systemd-analyze", "security", "--offline=true", "--threshold=30", str(unit)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert "Overall exposure level" in done.stdout, done.stderr
    assert done.returncode == 0, done.stdout[-300:]


async def test_systemd_hears_that_a_service_is_up_and_alive(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert not notify("READY=1")
    assert watchdog_s() is None
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as ours:
        ours.bind(str(tmp_path / "notify"))
        ours.settimeout(5)
        monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
        monkeypatch.setenv("WATCHDOG_USEC", "100000")
        task = asyncio.create_task(alive(lambda: "training docs-1"))
        await asyncio.sleep(0.3)
        said = [ours.recv(200).decode() for _ in range(3)]
        task.cancel()
    assert said[0] == "READY=1\nSTATUS=training docs-1"
    assert said[1].startswith("WATCHDOG=1")
    monkeypatch.setenv("WATCHDOG_PID", "1")
    assert watchdog_s() is None
    monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "gone"))
    assert not notify("READY=1")


@pytest.mark.parametrize(
    "file", sorted((PACKAGING / "container").glob("*.Containerfile")), ids=lambda f: f.name
)
def test_container_files_copy_what_is_there(file: Path) -> None:
    text = file.read_text()
    assert re.search(r"^USER (rankfleet|edge-agent)$", text, re.MULTILINE)
    assert "VOLUME /var/lib/" in text
    for line in re.findall(r"^COPY (.*)$", text, re.MULTILINE):
        for name in line.split()[:-1]:
            assert (PACKAGING.parent / name).exists(), name


def test_launchd_reads_the_plist() -> None:
    said = plistlib.loads((PACKAGING / "launchd" / "edge-agent.plist").read_bytes())
    assert said["ProgramArguments"][1] == "run"
    assert said["Umask"] == 0o077
    assert said["KeepAlive"] is True


@pytest.mark.parametrize("script", sorted((PACKAGING / "deb").glob("*")), ids=lambda f: f.name)
def test_scripts_are_sh(script: Path) -> None:
    assert script.read_text().startswith("#!/bin/sh\n")
    subprocess.run(["sh", "-n", str(script)], check=True)
