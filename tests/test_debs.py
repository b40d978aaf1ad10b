"""The Debian packages, in a clean root: built, installed, upgraded, rolled back, removed. The root is a
copy-on-write copy of ours."""

import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
RESTART = """#!/bin/sh
pkill -f '[/]opt/edge-agent.*run' && sleep 1
su -s /bin/sh edge-agent -c 'edge-agent run --config /etc/edge-agent/agent.yaml >/tmp/agent.log 2>&1 &'
"""


def can_mount(folder: Path) -> bool:
    if (
        os.name != "posix"
        or os.geteuid()
        or not shutil.which("dpkg-deb")
        or not Path("/usr/bin/python3").exists()
    ):
        return False
    for name in ("upper", "work", "root"):
        (folder / name).mkdir(parents=True)
    options = f"lowerdir=/,upperdir={folder}/upper,workdir={folder}/work"
    return (
        subprocess.run(
            ["mount", "-t", "overlay", "overlay", "-o", options, str(folder / "root")],
            check=False,
            capture_output=True,
        ).returncode
        == 0
    )


class CleanRoot:
    """Another root directory with its own changes and its own processes: an agent that is installed here
    is not touched."""

    def __init__(self, path: Path) -> None:
        self.path = path
        inside = "mount -t proc proc /proc; exec sleep 3600"
        self.holder = subprocess.Popen(
            [
                "unshare",
                "--pid",
                "--mount",
                "--fork",
                "--kill-child",
                "chroot",
                str(path),
                "/bin/sh",
                "-c",
                inside,
            ]
        )
        time.sleep(0.5)
        self.first = Path(f"/proc/{self.holder.pid}/task/{self.holder.pid}/children").read_text().split()[0]

    def within(self, *command: str) -> list[str]:
        return [
            "nsenter",
            "--target",
            self.first,
            "--pid",
            "--mount",
            f"--root=/proc/{self.first}/root",
            f"--wd=/proc/{self.first}/root",
            *command,
        ]

    def close(self) -> None:
        self.holder.kill()
        self.holder.wait()

    def run(self, command: str, code: int = 0, **environment: str) -> str:
        plain = {
            "PATH": "/usr/sbin:/usr/bin:/sbin:/bin",
            "LANG": "C.UTF-8",
            "DEBIAN_FRONTEND": "noninteractive",
            **environment,
        }
        done = subprocess.run(
            self.within("/bin/sh", "-c", command),
            capture_output=True,
            text=True,
            check=False,
            env=plain,
            timeout=200,
        )
        assert done.returncode == code, f"{command}\n{done.stdout}\n{done.stderr}"
        return done.stdout + done.stderr

    def agent(self, command: str) -> str:
        return self.run(f"su -s /bin/sh edge-agent -c '{command} --config /etc/edge-agent/agent.yaml'")

    def status(self) -> dict[str, object]:
        said: dict[str, object] = json.loads(self.agent("edge-agent status --json"))
        return said

    def until_connected(self, version: str) -> None:
        for _ in range(60):
            done = subprocess.run(
                self.within("cat", "/var/lib/edge-agent/status.json"),
                capture_output=True,
                text=True,
                check=False,
            )
            if f'"agent":"{version}"' in done.stdout and '"connected":true' in done.stdout:
                return
            time.sleep(0.5)
        raise AssertionError(
            self.run("cat /tmp/agent.log /tmp/coordinator.log; cat /var/lib/edge-agent/status.json || true")
        )


@pytest.fixture
def clean_root(tmp_path_factory: pytest.TempPathFactory) -> Iterator[CleanRoot]:
    folder = tmp_path_factory.mktemp("overlay")
    memory = (
        subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=2g", "tmpfs", str(folder)], check=False, capture_output=True
        )
        if os.name == "posix"
        else None
    )
    if memory is None or memory.returncode:
        pytest.skip("no file system can be mounted here")
    if not can_mount(folder):
        subprocess.run(["umount", str(folder)], check=False)
        pytest.skip("a clean root takes root rights, overlayfs and dpkg")
    root = folder / "root"
    subprocess.run(["mount", "--bind", "/dev", str(root / "dev")], check=True)
    clean = CleanRoot(root)
    try:
        yield clean
    finally:
        clean.close()
        for mounted in (root / "dev", root, folder):
            subprocess.run(["umount", "-l", str(mounted)], check=False)


def built(out: Path, version: str, program: str, source: Path = ROOT) -> Path:
    """A package, by the script that `make package` runs."""
    script = source / "packaging" / "deb" / "build.sh"
    subprocess.run(
        ["sh", str(script), str(out), sys.executable, version, program], check=True, capture_output=True
    )
    return next(out.glob(f"{program}_{version}_*.deb"))


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("dpkg-deb") is None, reason="dpkg-deb is not installed")
@pytest.mark.parametrize("program", ["coordinator", "edge-agent"])
def test_a_package_unpacks_into_its_own_places_and_asks_for_its_wheels_python(
    tmp_path: Path, program: str
) -> None:
    package = built(tmp_path, "0.1.0", program)
    listed = subprocess.run(
        ["dpkg-deb", "-c", str(package)], capture_output=True, text=True, check=True
    ).stdout
    names = [line.split()[5] for line in listed.splitlines()]
    assert {n.split("/")[1] for n in names if n != "./"} <= {"etc", "lib", "opt", "usr"}
    wheels = [n for n in names if n.endswith(".whl")]
    pythons = {tag for n in wheels for tag in n.split("-")[-3].split(".") if tag.startswith("cp")}
    abis = {n.split("-")[-2] for n in wheels}
    asked = subprocess.run(
        ["dpkg-deb", "-f", str(package), "Depends"], capture_output=True, text=True, check=True
    ).stdout
    low, high = re.search(r"python3 \(>= 3\.(\d+)\), python3 \(<< 3\.(\d+)\)", asked).groups()  # type: ignore[union-attr]
    assert int(high) == int(low) + 1
    assert any(a == f"cp3{low}" for a in abis), "no wheel is compiled for one Python alone"
    assert {a for a in abis if a.startswith("cp")} == {f"cp3{low}"}
    assert f"cp3{low}" in pythons


def broken(folder: Path) -> Path:
    """Our sources, with an agent that does not start."""
    for name in ("rankfleet", "edge_agent", "coordinator", "profiles", "bandit", "federated", "packaging"):
        shutil.copytree(
            ROOT / name, folder / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__")
        )
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder / name)
    service = folder / "edge_agent" / "service.py"
    service.write_text(service.read_text() + "\nraise RuntimeError('a bad release')\n")
    return folder


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_installed_upgraded_rolled_back_and_removed(clean_root: CleanRoot, tmp_path: Path) -> None:
    packages = [
        built(tmp_path / "out", "0.1.0", "coordinator"), built(tmp_path / "out", "0.1.0", "edge-agent"),
        built(tmp_path / "out", "0.1.1", "edge-agent"),
        built(tmp_path / "out", "0.1.2", "edge-agent", broken(tmp_path / "broken")),
    ]  # fmt: skip
    for sums in (tmp_path / "out").glob("SHA256SUMS-0.1.1"):
        subprocess.run(["sha256sum", "--check", "--quiet", sums.name], cwd=sums.parent, check=True)
    listed = json.loads((tmp_path / "out" / packages[1].name.replace(".deb", ".cdx.json")).read_text())
    assert {"rankfleet", "msgspec", "paho_mqtt"} <= {c["name"] for c in listed["components"]}
    for package in packages:
        shutil.copy(package, clean_root.path / "tmp" / package.name)
    coordinator, first, second, bad = (f"/tmp/{p.name}" for p in packages)

    # Installed, without an index and without torch: an idle agent needs neither.
    clean_root.run(f"dpkg -i {coordinator} {first}", RANKFLEET_NO_TORCH="1", PIP_NO_INDEX="1")
    assert clean_root.run("readlink /opt/edge-agent").strip() == "/opt/edge-agent.versions/0.1.0"
    assert clean_root.run("stat -c '%U %a' /var/lib/edge-agent").strip() == "edge-agent 700"
    assert "edge-agent enroll" in clean_root.run("edge-agent --help; edge-agent enroll --help")
    (clean_root.path / "etc/rankfleet/coordinator.yaml").write_text(
        "{data_dir: /var/lib/rankfleet, broker: {kind: amqtt, port: 0}}\n"
    )
    serve = "coordinator serve --config /etc/rankfleet/coordinator.yaml >/tmp/coordinator.log 2>&1 &"
    clean_root.run(f"su -s /bin/sh rankfleet -c '{serve}'")
    clean_root.run("for i in $(seq 50); do test -e /var/lib/rankfleet/api.json && break; sleep 0.2; done")
    token = clean_root.run(
        "su -s /bin/sh rankfleet -c 'coordinator invite box --config /etc/rankfleet/coordinator.yaml'"
    ).strip()
    clean_root.agent(f"edge-agent enroll {token} --no-probe")
    restart = clean_root.path / "tmp/restart"
    restart.write_text(RESTART)
    restart.chmod(0o755)
    clean_root.run("/tmp/restart")
    clean_root.until_connected("0.1.0")
    identity = clean_root.run("sha256sum /var/lib/edge-agent/identity.json /var/lib/edge-agent/device.key")

    # Upgraded: the new version checks in, the old one stays for a way back.
    upgrading = {
        "RANKFLEET_NO_TORCH": "1",
        "PIP_NO_INDEX": "1",
        "RANKFLEET_CHECK_IN": "1",
        "RANKFLEET_RESTART": "/tmp/restart",
    }
    clean_root.run(f"dpkg -i {second}", **upgrading, RANKFLEET_PATIENCE="40")
    assert clean_root.status()["agent"] == "0.1.1"
    assert clean_root.run("ls /opt/edge-agent.versions").split() == ["0.1.0", "0.1.1"]

    # A version that does not start: rolled back, and said.
    said = clean_root.run(f"dpkg -i {bad}", 1, **upgrading, RANKFLEET_PATIENCE="6")
    assert "did not check in within 6 s; 0.1.1 runs again" in said
    clean_root.until_connected("0.1.1")
    assert (
        clean_root.run("sha256sum /var/lib/edge-agent/identity.json /var/lib/edge-agent/device.key")
        == identity
    )

    # Removed: the program goes, what the device knows stays; purged: nothing stays.
    clean_root.run("pkill -f '[/]opt/edge-agent'; dpkg --remove edge-agent")
    assert not (clean_root.path / "opt/edge-agent.versions").exists()
    assert (clean_root.path / "var/lib/edge-agent/identity.json").exists()
    clean_root.run("dpkg --purge edge-agent; pkill -f '[/]opt/coordinator'; dpkg --purge coordinator")
    left = clean_root.run(
        "ls -d /opt/edge-agent* /opt/coordinator* /etc/edge-agent* /etc/rankfleet* /usr/bin/edge-agent || "
        "true"
    )
    left += clean_root.run(
        "ls -d /var/lib/edge-agent* /var/lib/rankfleet* /usr/lib/edge-agent* "
        "/lib/systemd/system/edge-agent* || true"
    )
    assert [line for line in left.splitlines() if "cannot access" not in line] == []
    assert "edge-agent" not in clean_root.run("cat /etc/passwd")
