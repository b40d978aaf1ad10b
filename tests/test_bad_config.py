"""What people type wrong, in both programs: one line that says what, where and what to do; exit code 1;
nothing half done."""

import json
from pathlib import Path
from typing import Any

import psutil
import pytest

from rankfleet.coordinator import cli as coordinator
from rankfleet.edge_agent import cli as agent
from rankfleet.federated.program.files import write_atomic
from rankfleet.federated.trust.claim import Claim, write_claim


def run(program: Any, capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str]:
    code = program.main(list(words))
    return code, capsys.readouterr().err


COORDINATOR = [
    (
        "broker: {host: 0.0.0.0, tls: false}",
        "the broker at 0.0.0.0 would be used without TLS over a network",
        "leave `broker.tls` out",
    ),
    (
        "broker: {url: 'mqtt://far.example'}",
        "the broker at far.example:1883 would be used without TLS",
        "serve --insecure",
    ),
    (
        "broker: {port: 0}\nhttps: {host: 127.0.0.1, cert_file: /nowhere.pem, models: true}",
        "https: /nowhere.pem",
        "PEM files",
    ),
    (
        "data_dri: x",
        "coordinator.yaml, line 1 (`data_dri`): unknown key `data_dri`",
        "did you mean `data_dir`",
    ),
    (
        "limits:\n  packet_byte: 5",
        "line 2 (`limits.packet_byte`): unknown key `packet_byte`",
        "did you mean `packet_bytes`",
    ),
    ("limits: {packet_bytes: 12}", "Expected `int` >= 256", ""),
    ("broker: {kind: rabbit}", "broker.kind `rabbit` is not known", "auto, mosquitto or amqtt"),
    ("broker: {url: 'http://x'}", "broker address 'http://x' is not understood", "mqtt://host:1883"),
    ("broker: {url: 'mqtts://x', ca_file: /none.pem}", "TLS files /none.pem", "PEM files"),
    (
        "broker: {url: 'mqtts://x', proxy: 'ftp://y:1'}",
        "proxy 'ftp://y:1' is not understood",
        "http://user:password@host",
    ),
    ("fleet: 'a/b'", "fleet name 'a/b' is not allowed", ""),
    ("a: [1\n", "coordinator.yaml", ""),
    ("fleet: x\nfleet: y", "fleet", "twice"),
]


@pytest.mark.parametrize(("text", "message", "hint"), COORDINATOR)
def test_the_coordinators_yaml(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str, message: str, hint: str
) -> None:
    (tmp_path / "coordinator.yaml").write_text(
        text if "data_d" in text else f"{text}\ndata_dir: {tmp_path / 'c'}\n"
    )
    code, said = run(coordinator, capsys, "serve", "--config", str(tmp_path / "coordinator.yaml"))
    assert code == 1
    assert message in said
    assert hint in said
    assert "Traceback" not in said
    if (started := tmp_path / "c" / "broker.pid").exists():
        assert not psutil.pid_exists(int(started.read_text())), "its broker runs on"


AGENT = [
    ("state_dri: x", "unknown key `state_dri`", "did you mean `state_dir`"),
    ("link: {keepalive: 5}", "unknown key `keepalive`", "did you mean `keepalive_s`"),
    ("link: {packet_bytes: 9999999}", "Expected `int` <= 120000", ""),
    ("datasets: {d: {pth: x}}", "unknown key `pth`", "did you mean `path`"),
    ("profile: toaster", "profile `toaster` is not known", "auto, or one of"),
    ("link: {ca_file: /none.pem}", "TLS files /none.pem", "PEM files"),
    ("link: {proxy: 'nonsense'}", "proxy", "is not understood"),
    ("allow: {mb_per_day: -1}", "Expected `float` > 0", ""),
]


@pytest.mark.parametrize(("text", "message", "hint"), AGENT)
def test_the_agents_yaml(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str, message: str, hint: str
) -> None:
    home = tmp_path / "state"
    write_atomic(home / "identity.json", json.dumps({**IDENTITY}).encode())
    (tmp_path / "agent.yaml").write_text(text if "state_d" in text else f"{text}\nstate_dir: {home}\n")
    code, said = run(agent, capsys, "run", "--config", str(tmp_path / "agent.yaml"))
    assert code == 1
    assert message in said
    assert hint in said
    assert "Traceback" not in said


IDENTITY: dict[str, Any] = {
    "fleet": "main", "device": "d0", "broker": "mqtt://localhost:1", "link_key": "AAAA",
    "coordinator": "AAAA", "public_key": "AAAA",
}  # fmt: skip


@pytest.mark.parametrize(
    ("words", "message", "hint"),
    [
        (["run"], "this device is not enrolled", "edge-agent enroll TOKEN"),
        (["status"], "the service has not run here", "edge-agent run"),
        (["enroll", "rf1.nonsense", "--no-probe"], "not a claim token", "coordinator invite"),
        (["leave"], "this removes identity", "edge-agent leave --yes"),
    ],
)
def test_an_agent_that_is_nowhere(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], message: str, hint: str
) -> None:
    (tmp_path / "agent.yaml").write_text(f"state_dir: {tmp_path / 'state'}\n")
    code, said = run(agent, capsys, *words, "--config", str(tmp_path / "agent.yaml"))
    assert code == 1
    assert message in said
    assert hint in said


def test_a_missing_yaml_is_named_by_both(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for program, words in ((coordinator, ["jobs"]), (agent, ["run"])):
        code, said = run(program, capsys, *words, "--config", str(tmp_path / "none.yaml"))
        assert code == 1
        assert "none.yaml" in said
        assert "Traceback" not in said


@pytest.mark.parametrize(
    "words",
    [
        ["jobs"],
        ["submit", "{job}"],
        ["watch", "x-1", "--once"],
        ["devices"],
        ["invite", "d"],
        ["rounds", "x-1"],
    ],
)
def test_no_service_is_said_by_every_verb(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str]
) -> None:
    (tmp_path / "c.yaml").write_text(f"data_dir: {tmp_path / 'c'}\n")
    (tmp_path / "job.yaml").write_text("name: x\nmodel: m\ntask: {dataset: d}\n")
    code, said = run(
        coordinator,
        capsys,
        *(w.format(job=tmp_path / "job.yaml") for w in words),
        "--config",
        str(tmp_path / "c.yaml"),
    )
    assert code == 1
    assert "no coordinator has run here" in said
    assert "coordinator serve" in said


@pytest.mark.parametrize("kind", ["peft", "merged", "gguf"])
def test_an_export_of_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str) -> None:
    (tmp_path / "c").mkdir()
    (tmp_path / "c.yaml").write_text(f"data_dir: {tmp_path / 'c'}\n")
    code, said = run(
        coordinator,
        capsys,
        "export",
        "x-1",
        "--to",
        str(tmp_path / "out"),
        "--format",
        kind,
        "--config",
        str(tmp_path / "c.yaml"),
    )
    assert code == 1
    assert "no job `x-1`" in said
    assert not (tmp_path / "out").exists()


def test_a_damaged_identity_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    home = tmp_path / "state"
    write_atomic(home / "identity.json", b"{broken")
    (tmp_path / "agent.yaml").write_text(f"state_dir: {home}\n")
    code, said = run(agent, capsys, "run", "--config", str(tmp_path / "agent.yaml"))
    assert code == 1
    assert "identity.json" in said
    assert "enroll again" in said


def test_a_state_folder_that_cannot_be_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("in the way")
    (tmp_path / "agent.yaml").write_text(f"state_dir: {tmp_path / 'file' / 'state'}\n")
    token = write_claim(Claim("main", "d0", "mqtt://localhost:1", b"s" * 32, b"k" * 32))
    code, said = run(agent, capsys, "enroll", token, "--no-probe", "--config", str(tmp_path / "agent.yaml"))
    assert code == 1
    assert "set `state_dir`" in said
