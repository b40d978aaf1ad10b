"""The whole path in one process: assignment, training, upload, aggregation, installation; and what happens
when things break."""

import asyncio
from pathlib import Path

import numpy as np
import pytest

from rankfleet.coordinator.export import load
from rankfleet.coordinator.store import database, tables
from rankfleet.coordinator.store.versions import Registry
from rankfleet.federated.transport.memory import MemoryBroker
from rankfleet.federated.wire.frame import open_frame
from rankfleet.federated.wire.messages import read_assignment

from .world import World, job


async def test_a_job_runs_to_its_end_and_learns(tmp_path: Path, tiny: Path) -> None:
    async with World(tmp_path, tiny) as world:
        name = await world.run(
            job(rounds=6, arms={"ranks": [2, 4], "bits": [32], "steps": [8], "batch": 8}, stack=["sparse"])
        )
        rows = world.coordinator.ledger.rows(tables.versions, job=name)
        first, last = (database.read(rows[i]["metrics"]) for i in (0, -1))
        assert len(rows) == 7
        assert last["loss"] < first["loss"] - 0.2
        assert all(
            r["state"] == "counted"
            for r in world.coordinator.ledger.rows(tables.assignments, job=name)
            if r["round"] < 6
        )
        for d in world.names:
            assert (tmp_path / d / "adapter" / "current" / "adapter_model.safetensors").exists()
            await world.until(lambda d=d: not list((tmp_path / d / "jobs").glob("*/*/update")))  # type: ignore[misc]
        version, spec = load(world.coordinator.config, name)
        assert version.number in range(7)
        assert spec.name == "toy"


async def test_lossy_broker_changes_nothing(tmp_path: Path, tiny: Path) -> None:
    text = job(stack=["sparse"])
    async with World(tmp_path / "a", tiny, packet=300) as world:
        clean = world.digest(await world.run(text))
    broken = MemoryBroker(drop=0.1, double=0.1, reorder=0.1, seed=3)
    async with World(tmp_path / "b", tiny, broker=broken, packet=300) as world:
        assert world.digest(await world.run(text, seconds=150)) == clean


async def test_kill_both_sides_in_mid_run(tmp_path: Path, tiny: Path) -> None:
    text = job(stack=["sparse"], rounds=3)
    async with World(tmp_path / "a", tiny) as world:
        clean = world.digest(await world.run(text))
    async with World(tmp_path / "b", tiny) as world:
        name = world.coordinator.jobs.submit(text)
        for number in (0, 1, 2):
            await world.until(
                lambda n=number: any(  # type: ignore[misc]
                    r["state"] in ("received", "counted")
                    for r in world.coordinator.ledger.rows(tables.assignments, job=name, round=n)
                )
            )
            await world.kill_agent("d1")
            await world.kill_coordinator()
            await world.start_coordinator()
            await world.start_agent("d1")
        await world.until(lambda: world.job_state(name) == "finished")
        assert world.digest(name) == clean
        counted = [
            (r["round"], r["device"])
            for r in world.coordinator.ledger.rows(tables.assignments, job=name)
            if r["state"] == "counted"
        ]
        assert sorted(counted) == [(n, d) for n in range(3) for d in world.names]


async def test_resume_after_a_kill_in_mid_upload(tmp_path: Path, tiny: Path) -> None:
    async with World(tmp_path, tiny, packet=300) as world:
        agent, _ = world.agents["d0"]
        sent = 0
        publish = agent._publish

        async def slow(kind: str, payload: bytes) -> bool:
            nonlocal sent
            if kind == "chunk":
                sent += 1
                if sent > 3:
                    await asyncio.sleep(3600)
            return await publish(kind, payload)

        agent._publish = slow  # type: ignore[method-assign]
        name = world.coordinator.jobs.submit(job(rounds=1))
        uploads = world.coordinator.uploads
        await world.until(
            lambda: sent > 3 and "d0" in uploads.live and len(uploads.live["d0"].assembly.have) == 3
        )
        uploads.save()
        await world.kill_agent("d0")
        await world.kill_coordinator()
        await world.start_coordinator()
        await world.start_agent("d0")
        await world.until(lambda: world.job_state(name) == "finished")
        row = world.coordinator.ledger.row(tables.assignments, job=name, round=0, device="d0")
        assert row is not None
        assert row["resumed"] == 3


async def test_arms_that_no_device_can_hold_are_refused_before_anything_is_sent(
    tmp_path: Path, tiny: Path
) -> None:
    async with World(tmp_path, tiny, budgets={"d0": 0.001}) as world:
        name = await world.run(job(rounds=1))
        assert {r["device"] for r in world.coordinator.ledger.rows(tables.assignments, job=name)} == {
            "d1",
            "d2",
        }
        told = [
            e["text"] for e in world.coordinator.ledger.rows(tables.events, job=name) if e["device"] == "d0"
        ]
        assert "allows 0 MB" in told[0]


async def test_a_memory_failure_is_reported_and_the_round_goes_on(tmp_path: Path, tiny: Path) -> None:
    async with World(tmp_path, tiny) as world:

        def fail(order: object) -> None:
            raise MemoryError("no room")

        world.agents["d0"][0].engine.before = fail  # type: ignore[attr-defined]
        name = await world.run(job(rounds=2))
        rows = world.coordinator.ledger.rows(tables.assignments, job=name, round=0)
        assert [(r["device"], r["state"]) for r in rows] == [
            ("d0", "failed"),
            ("d1", "counted"),
            ("d2", "counted"),
        ]
        assert "no room" in rows[0]["reason"]


@pytest.mark.parametrize(
    ("placement", "depth"), [("rising(0..1, total=6)", 2), ("scored(query,value@0; r=2..4)", 2)]
)
async def test_placements_with_unequal_ranks_and_gaps(
    tmp_path: Path, tiny: Path, placement: str, depth: int
) -> None:
    arms = {"ranks": [2], "placements": [placement], "bits": [32], "steps": [2], "batch": 4}
    async with World(tmp_path, tiny, devices=2) as world:
        name = await world.run(
            job(rounds=2, arms=arms, policy={"name": "fixed", "settings": {"placement": placement}})
        )
        version, _ = load(world.coordinator.config, name, 2)
        moved = {m for m, p in version.pairs.items() if abs(p.B).max() > 0}
        assert moved == (
            {m for m in moved if "query" in m or "value" in m}
            if "scored" in placement
            else set(version.pairs)
        )
        assert all(".0." in m for m in moved) or "rising" in placement


async def test_quantised_and_pruned_arms(tmp_path: Path, tiny: Path) -> None:
    arms = {"ranks": [2], "bits": [4, 8], "steps": [2], "batch": 4, "prune": [0.4]}
    async with World(tmp_path, tiny, devices=2) as world:
        name = await world.run(job(rounds=2, arms=arms))
        told = [
            database.read(r["telemetry"])
            for r in world.coordinator.ledger.rows(tables.assignments, job=name, round=1)
        ]
        assert {t["bits"] for t in told} <= {4, 8}
        assert all(t["loss_after"] > 0 for t in told)


async def test_bf16_arms(tmp_path: Path, tiny: Path) -> None:
    async with World(tmp_path, tiny, devices=2) as world:
        name = await world.run(
            job(rounds=3, arms={"ranks": [2], "bits": [16], "steps": [6], "batch": 8}, training={"lr": 0.03})
        )
        versions = [
            database.read(r["metrics"]) for r in world.coordinator.ledger.rows(tables.versions, job=name)
        ]
        assert versions[-1]["loss"] < versions[0]["loss"]


async def test_images_are_a_task_too(tmp_path: Path, vit: Path) -> None:
    import json

    from sklearn.datasets import load_digits

    digits = load_digits()
    world = World(tmp_path, vit, devices=2, task="image_classification")
    for i, d in enumerate(world.names):
        rows = [
            {"pixels": (x / 16).tolist(), "label": str(y)}
            for x, y in zip(digits.data[i::4], digits.target[i::4], strict=True)
        ]
        world.data[d].write_text("\n".join(json.dumps(r) for r in rows))
    async with world:
        name = await world.run(
            job(
                rounds=16,
                task={
                    "dataset": "words",
                    "kind": "image_classification",
                    "labels": [str(i) for i in range(10)],
                },
                arms={"ranks": [8], "bits": [32], "steps": [25], "batch": 16},
                training={"lr": 0.01, "evaluate": 90, "probe": 4},
            )
        )
        rows = world.coordinator.ledger.rows(tables.versions, job=name)
        first, last = (database.read(rows[i]["metrics"]) for i in (0, -1))
        assert last["accuracy"] > first["accuracy"] + 0.2


async def test_a_sleeping_device_does_not_hold_the_round_and_its_late_update_is_folded(
    tmp_path: Path, tiny: Path
) -> None:
    async with World(tmp_path, tiny) as world:
        agent, _ = world.agents["d0"]
        publish, asleep = agent._publish, True

        async def sleepy(kind: str, payload: bytes) -> bool:
            while asleep and kind == "chunk":
                await asyncio.sleep(0.05)
            return await publish(kind, payload)

        agent._publish = sleepy  # type: ignore[method-assign]
        name = world.coordinator.jobs.submit(job(rounds=4, deadline_s=2, quorum=0.6))
        await world.until(lambda: len(world.coordinator.ledger.rows(tables.versions, job=name)) >= 2)
        row = world.coordinator.ledger.row(tables.assignments, job=name, round=0, device="d0")
        assert row is not None
        assert row["state"] == "late"
        asleep = False
        await world.until(lambda: world.job_state(name) == "finished", 90)
        row = world.coordinator.ledger.row(tables.assignments, job=name, round=0, device="d0")
        assert row is not None
        assert row["state"] == "counted"
        assert row["folded"] > 0


async def test_other_work_ends_a_download_that_cannot_end(tmp_path: Path, tiny: Path) -> None:
    async with World(tmp_path, tiny, devices=1) as world:
        world.coordinator.blobs.want = lambda digest, missing: None  # type: ignore[method-assign]
        name = world.coordinator.jobs.submit(job(rounds=1))
        await world.until(lambda: world.agents["d0"][0].status["state"] == "downloading")
        world.coordinator.jobs.cancel(name)
        del world.coordinator.blobs.want
        await world.run(job(rounds=1))


async def test_a_paused_job_opens_no_round_until_it_is_resumed(tmp_path: Path, tiny: Path) -> None:
    async with World(tmp_path, tiny, devices=1) as world:
        name = world.coordinator.jobs.submit(job(rounds=40))
        await world.until(lambda: len(world.coordinator.ledger.rows(tables.rounds, job=name)) >= 2)
        world.coordinator.ledger.change(tables.jobs, {"id": name}, state="paused")
        await asyncio.sleep(0.5)
        there = len(world.coordinator.ledger.rows(tables.rounds, job=name))
        await asyncio.sleep(1.0)
        assert len(world.coordinator.ledger.rows(tables.rounds, job=name)) == there
        world.coordinator.ledger.change(tables.jobs, {"id": name}, state="running")
        await world.until(lambda: len(world.coordinator.ledger.rows(tables.rounds, job=name)) > there)
        world.coordinator.jobs.cancel(name)
        await world.until(lambda: world.job_state(name) == "cancelled")


async def test_a_single_device_is_followed_exactly(
    tmp_path: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Version 1 is what the device ended with, and what it is shown next is that too: s is in neither
    twice."""
    monkeypatch.setattr(
        "rankfleet.coordinator.rounds.verdict.is_latest_good", lambda run: False
    )  # raw updates stay, to be looked at
    arms = {"ranks": [4], "depths": [2], "bits": [32], "steps": [4], "batch": 4}
    async with World(tmp_path, tiny, devices=1) as world:
        name = await world.run(job(rounds=2, arms=arms))
        rows = world.coordinator.ledger.rows(tables.assignments, job=name)
        views = [
            open_frame(world.coordinator.blobs.path(read_assignment(r["body"]).blobs["view"].digest))[0]
            for r in rows[:2]
        ]
        sent, _ = open_frame(tmp_path / "coordinator" / "updates" / name / "r000000" / "d0")
        version = Registry(tmp_path / "coordinator" / "jobs" / name).load(1)
    for module, pair in version.pairs.items():
        b, a = (views[0][f"{module}.{s}"] + sent[f"d/{module}.{s}"] for s in "BA")
        assert np.linalg.norm(b @ a) > 0
        for got in (pair.B @ pair.A, views[1][f"{module}.B"] @ views[1][f"{module}.A"]):
            assert np.linalg.norm(got - b @ a) < 1e-4 * np.linalg.norm(b @ a)
    assert np.allclose(
        version.dense["head.weight"], views[0]["head.weight"] + sent["d/head.weight"], atol=1e-6
    )
