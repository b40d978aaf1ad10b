"""Conditions, metrics and logs of both programs."""

import asyncio
import json
import logging
from pathlib import Path
from typing import Any

import pytest

import rankfleet.coordinator.health
import rankfleet.edge_agent.health
from rankfleet.coordinator.store import tables
from rankfleet.federated.program.health import Declared, holding
from rankfleet.federated.program.logs import begin, redacted
from rankfleet.federated.program.metrics import MetricsServer, text

from .world import World, job


def test_a_cause_hides_what_follows_from_it() -> None:
    declared: list[Declared[dict[str, str]]] = [
        Declared("power", "error", lambda p: p.get("power", ""), "plug it in"),
        Declared("dark", "warning", lambda p: p.get("dark", ""), depends_on=("power",)),
        Declared("broken", "error", lambda p: p["not there"]),
    ]
    both = holding(declared, {"power": "no power", "dark": "no light", "not there": ""})
    assert [(c.code, c.do) for c in both] == [("power", "plug it in")]
    assert [c.code for c in holding(declared, {"dark": "no light", "not there": ""})] == ["dark"]
    assert "cannot be told" in holding(declared, {})[0].text


@pytest.mark.parametrize(
    "declared", [rankfleet.coordinator.health.CONDITIONS, rankfleet.edge_agent.health.CONDITIONS]
)
def test_causes_stand_before_what_follows_from_them(declared: Any) -> None:
    seen: set[str] = set()
    for d in declared:
        assert set(d.depends_on) <= seen
        assert d.code not in seen
        assert d.do
        seen.add(d.code)


async def fetched(port: int, request: bytes = b"GET /metrics HTTP/1.1\r\n\r\n") -> str:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(request)
    answer = await reader.read()
    writer.close()
    return answer.decode()


async def test_what_prometheus_sees(tmp_path: Path, tiny: Path) -> None:
    async with World(tmp_path, tiny, devices=2) as world:
        await world.run(job(rounds=1, stack=["sparse"]))
        agent = world.agents["d0"][0]
        server = MetricsServer(
            lambda: (
                rankfleet.coordinator.health.exposition(world.coordinator)
                + rankfleet.edge_agent.health.exposition(agent)
            )
        )
        await server.start("127.0.0.1", 0)
        said = await fetched(server.port)
        assert said.startswith("HTTP/1.1 200 OK")
        for line in (
            'rankfleet_devices{state="enrolled"} 2', 'rankfleet_jobs{state="finished"} '
                                                     '1', "rankfleet_broker_connected 1",
            'rankfleet_condition{code="disk-full",severity="error"} '
            '0', "# TYPE rankfleet_messages_dropped_total counter",
            "rankfleet_agent_jobs_done_total 1", 'rankfleet_agent_state{state="idle"} '
                                                 '1', "rankfleet_agent_updates_waiting 0",
        ):  # fmt: skip
            assert f"\n{line}\n" in said.replace("\r", ""), line
        assert (await fetched(server.port, b"GET /other HTTP/1.1\r\n\r\n")).startswith("HTTP/1.1 404")
        assert await fetched(server.port, b"x" * 20_000) == ""
        await server.stop()


async def test_metrics_while_a_job_runs(tmp_path: Path, tiny: Path) -> None:
    async with World(tmp_path, tiny, devices=2) as world:
        name = world.coordinator.jobs.submit(job(rounds=4, stack=["sparse"]))
        await world.until(lambda: len(world.coordinator.ledger.rows(tables.versions, job=name)) >= 3)
        said = rankfleet.coordinator.health.exposition(world.coordinator)
        assert f'rankfleet_heldout_loss{{job="{name}"}}' in said
        assert 'state="counted"' in said
        await world.until(lambda: world.job_state(name) == "finished")


async def test_conditions_of_a_fleet(tmp_path: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with World(tmp_path, tiny, devices=1) as world:
        codes = lambda: [c.code for c in rankfleet.coordinator.health.conditions(world.coordinator)]  # noqa: E731
        agent = world.agents["d0"][0]
        ours = lambda: [c.code for c in rankfleet.edge_agent.health.conditions(agent)]  # noqa: E731
        assert codes() == ours() == []
        world.coordinator.suspend("d0", "a test")
        world.coordinator.jobs.problem = "the ledger waits"
        assert codes() == ["job-waits", "device-suspended"]
        monkeypatch.setattr(rankfleet.coordinator.health, "_free_mb", lambda service: 50.0)
        assert codes() == ["disk-full", "device-suspended"]  # the job waits because of the disk
        agent.bus.connected.clear()
        world.data["d0"].unlink()
        agent.status.counters.today = 10**12
        assert ours() == ["broker-away", "data-missing", "traffic-spent"]


def test_labels_are_escaped() -> None:
    assert (
        text("x", {"a": ("gauge", "b")}, [("a", {"n": 'q"\\\n'}, 1.0)])
        == '# HELP x_a b\n# TYPE x_a gauge\nx_a{n="q\\"\\\\\\n"} 1\n'
    )


@pytest.mark.parametrize(
    ("said", "secret"),
    [
        ("token rf1.lqRtYWluomQwsW1xdHQ6Ly9sb2", "lqRtYWlu"),
        ("mqtts://user:pa55@host:8883 is away", "pa55"),
        ("password=hunter2 was wrong", "hunter2"),
        ("Authorization: Bearer abcdef", "abcdef"),
    ],
)
def test_logs_keep_secrets(said: str, secret: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert secret not in redacted(said)
    root = logging.getLogger()
    before = root.handlers[:], root.level
    try:
        begin("json", logging.INFO)
        logging.getLogger("x").info("%s", said)
        line = json.loads(capsys.readouterr().err)
        assert line["level"] == "info"
        assert secret not in line["text"]
    finally:
        root.handlers[:], root.level = before
