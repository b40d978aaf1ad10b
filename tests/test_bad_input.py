"""What people and devices get wrong: one clear error each, and the services live on."""

import asyncio
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rankfleet.coordinator.store import tables
from rankfleet.edge_agent.config import Allow, Dataset
from rankfleet.edge_agent.trust import identity
from rankfleet.federated.errors import ConfigError
from rankfleet.federated.transport.topics import Topics
from rankfleet.federated.wire.frame import encode
from rankfleet.federated.wire.messages import Envelope, Offer, Want, manifest, seal
from rankfleet.federated.wire.transfer import blob_of, cut

from .world import LABELS, World, job

BAD_JOBS = [
    (job(rouns=3), "unknown key `rouns`\n  try: did you mean `rounds`"),
    (job(model="other"), "the coordinator has no base model `other`; it has tiny"),
    (job(stack=["fedpox"]), "no method named `fedpox`\n  try: did you mean `fedprox`"),
    (
        job(stack=["fedbuff", "fedit", "ditto", {"qsgd": {"levels": 999}}]),
        "method `qsgd`: Expected `int` <= 127",
    ),
    (job(policy={"name": "ucb7"}), "policy `ucb7` is not known"),
    (job(policy={"name": "ucb1", "settings": {"x": 1}}), "policy `ucb1`.*unknown field `x`"),
    (job(adapter={"targets": ["nothing"]}), "no module of .* ends with nothing"),
    (job(arms={"bits": [7]}), "arms.bits: 7 is not one of 32, 16, 8, 4"),
    (job(arms={"depths": [9]}), "none is within max_depth 2"),
    (job(arms={"placements": ["top(x)"]}), "placement `top\\(x\\)` is not understood"),
    (job(arms={"placements": ["rising(0..9, total=4)"]}), "the model has layers 0..1"),
    (job(task={"dataset": "words", "labels": []}), "needs `labels`"),
    (job(task={"dataset": "words", "labels": ["a", "a"]}), "holds a label twice"),
    (
        job(task={"dataset": "words", "kind": "translation", "labels": LABELS}),
        "task `translation` is not known",
    ),
    (job(stack=["scaffold"], arms={"prune": [0, 0.5]}), "`arms.prune` would cut them"),
    (job(name="a/b"), "job name 'a/b' is not allowed"),
    (job(training={"lr": -1}), "Expected `float` > 0"),
    (job(quorum=1.5), "Expected `float` <= 1"),
]


@pytest.mark.parametrize(("text", "message"), BAD_JOBS)
async def test_bad_jobs_are_refused_whole(tmp_path: Path, tiny: Path, text: str, message: str) -> None:
    world = World(tmp_path, tiny, devices=0)
    await world.start_coordinator()
    with pytest.raises(ConfigError, match=message):
        world.coordinator.jobs.submit(text)
    assert not world.coordinator.ledger.rows(tables.jobs)
    await world.kill_coordinator()


async def refused_reason(world: World, name: str, device: str = "d0") -> str:
    """Why a device did not take part, while the others finished the job."""
    rows = world.coordinator.ledger.rows(tables.assignments, job=name, round=0)
    assert {r["device"]: r["state"] for r in rows if r["device"] != device} == {
        d: "counted" for d in world.names if d != device
    }
    return str(next(r["reason"] for r in rows if r["device"] == device))


@pytest.mark.parametrize(
    ("change", "content", "message"),
    [
        ({}, None, "does not exist"),
        (
            {"columns": {"text": "body"}},
            [{"text": "red", "label": "sky"}],
            "has no column `body`; it has text, label",
        ),
        (
            {},
            [{"text": f"red {i}", "label": "who knows"} for i in range(9)],
            "9 of 9 examples have a label that the job does not know",
        ),
        ({}, [], "no example to train on"),
        ({}, "{not json", "line 1"),
    ],
)
async def test_bad_data_is_one_refusal(
    tmp_path: Path, tiny: Path, change: dict[str, Any], content: Any, message: str
) -> None:
    world = World(tmp_path, tiny)
    if content is None:
        world.data["d0"].unlink()
    elif isinstance(content, str):
        world.data["d0"].write_text(content)
    else:
        world.data["d0"].write_text("\n".join(json.dumps(r) for r in content))
    world.agent_changes["d0"] = {"datasets": {"words": Dataset(str(world.data["d0"]), **change)}}
    async with world:
        assert message in await refused_reason(world, await world.run(job(rounds=1)))
        assert world.agents["d0"][0].status.get("last_error")


async def test_the_owner_says_no(tmp_path: Path, tiny: Path) -> None:
    world = World(tmp_path, tiny)
    world.agent_changes["d0"] = {"allow": Allow(methods=("sparse",))}
    world.agent_changes["d1"] = {"require": ("qsgd",)}
    async with world:
        name = await world.run(job(rounds=1, stack=["norm_bound"]))
        states = {
            r["device"]: (r["state"], r["reason"])
            for r in world.coordinator.ledger.rows(tables.assignments, job=name, round=0)
        }
        assert "d0" not in states
        assert "owner requires `qsgd`, which the coordinator would have to undo" in states["d1"][1]
        assert states["d2"][0] == "counted"


async def test_a_wrong_model_is_noticed(tmp_path: Path, tiny: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    for file in tiny.iterdir():
        (other / file.name).write_bytes(file.read_bytes())
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**config, "note": "changed"}))
    world = World(tmp_path, tiny)
    world.agent_changes["d0"] = {"models": {"tiny": str(other)}}
    async with world:
        assert "put the same files on every device" in await refused_reason(
            world, await world.run(job(rounds=1))
        )


async def test_hostile_messages_are_dropped_and_counted(tmp_path: Path, tiny: Path) -> None:
    async with World(tmp_path, tiny) as world:
        topics, bus = Topics("main"), world.agents["d0"][0].bus
        key = identity.load(tmp_path / "d0").link_key
        before = world.coordinator.dropped
        import msgspec

        for topic, payload in (
            (topics.device("d0", "up"), b"rubbish"),
            (topics.device("d0", "up"), b"\0" * 2_000_000),
            (topics.device("d0", "up"), b""),
            (topics.device("ghost", "up"), seal(Want("ab", []), "ghost", key)),
            (topics.device("d1", "up"), seal(Want("ab", []), "d0", key)),
            (topics.device("d0", "up"), seal(Want("ab", []), "d0", b"another key")),
            (topics.device("d0", "up"), msgspec.msgpack.encode(Envelope(99, "d0", 1, b"", b""))),
        ):
            await bus.publish(topic, payload)
        await bus.publish(topics.device("d0", "chunk"), b"\1short")
        await bus.publish(topics.device("d0", "up"), seal(Want("ab" * 32, [(0, 2**60)]), "d0", key))
        await world.until(lambda: world.coordinator.dropped == before + 7)
        assert "speaks protocol 99" in world.coordinator.live["d0"]["last_error"]
        assert "not known" in world.coordinator.live["ghost"]["last_error"]
        await world.run(job(rounds=1))


async def test_an_update_with_nan_is_refused_and_the_round_closes(tmp_path: Path, tiny: Path) -> None:
    await forged_update(
        tmp_path, tiny, {"d/head.bias": np.array([np.nan] * 4, np.float32)}, "holds NaN or infinity"
    )


async def test_an_update_of_the_wrong_shape_is_put_aside(tmp_path: Path, tiny: Path) -> None:
    await forged_update(
        tmp_path, tiny, {"d/head.bias": np.zeros(999, np.float32)}, "shape (999,), expected (4,)"
    )


async def test_an_unsigned_update_is_refused(tmp_path: Path, tiny: Path) -> None:
    await forged_update(
        tmp_path,
        tiny,
        {"d/head.bias": np.zeros(4, np.float32)},
        "not signed by this device's key",
        sign=False,
    )


async def forged_update(
    home: Path, model: Path, tensors: dict[str, Any], message: str, sign: bool = True
) -> None:
    """d0's agent is replaced by one that sends what it likes, correctly sealed."""
    async with World(home, model) as world:
        agent, _ = world.agents["d0"]
        bus, key = agent.bus, agent.identity.link_key

        async def forged(job_: Any, raw: bytes, folder: Path) -> None:
            data = encode(tensors, {"examples": 5})
            blob = blob_of(data, 2000)
            signature = (
                identity.signer(home / "d0").sign(manifest(job_.job, job_.round, "d0", blob.digest))
                if sign
                else b"x" * 64
            )
            await agent.say(Offer(job_.job, job_.round, blob, signature))
            await asyncio.sleep(0.2)
            for n in range(blob.chunks):
                await bus.publish(Topics("main").device("d0", "chunk"), cut(data, blob, n))

        agent._one = forged  # type: ignore[method-assign, assignment]
        assert key
        name = await world.run(job(rounds=1))
        assert message in await refused_reason(world, name)


async def test_an_oversized_update_is_refused_before_a_byte_is_sent(tmp_path: Path, tiny: Path) -> None:
    from rankfleet.federated.wire.messages import Blob

    async with World(tmp_path, tiny) as world:
        agent, _ = world.agents["d0"]

        async def forged(job_: Any, raw: bytes, folder: Path) -> None:
            await agent.say(Offer(job_.job, job_.round, Blob("ab" * 32, 10**12, 100_000), b""))

        agent._one = forged  # type: ignore[method-assign, assignment]
        assert "at most 512 MB" in await refused_reason(world, await world.run(job(rounds=1)))
        assert "at most 512 MB" in agent.status.get("last_error")


async def test_a_claim_is_for_one_device_once(tmp_path: Path, tiny: Path) -> None:
    world = World(tmp_path, tiny, devices=1)
    async with world:
        with pytest.raises(ConfigError, match="this device is enrolled as `d0`"):
            identity.enroll(world.coordinator.invite("d0b"), tmp_path / "d0")
        for token in ("", "rf1.", "rf1.xx", "nonsense", "rf1." + "A" * 500):
            with pytest.raises(ConfigError, match="not a claim token"):
                identity.enroll(token, tmp_path / "new")


async def test_a_second_device_with_the_same_token_is_refused(tmp_path: Path, tiny: Path) -> None:
    world = World(tmp_path, tiny, devices=1)
    await world.start_coordinator()
    token = world.coordinator.invite("d0")
    identity.enroll(token, tmp_path / "d0")
    await world.start_agent("d0")
    await world.until(lambda: world.coordinator.devices.table()[0]["state"] == "enrolled")
    await world.kill_agent("d0")
    (tmp_path / "d0").rename(tmp_path / "original")
    identity.enroll(token, tmp_path / "d0")
    thief = await world.start_agent("d0")
    await world.until(lambda: "another key is enrolled" in thief.status.get("last_error", ""))
    await world.kill_agent("d0")
    await world.kill_coordinator()


async def test_cancel_and_pause(tmp_path: Path, tiny: Path) -> None:
    async with World(tmp_path, tiny) as world:
        name = world.coordinator.jobs.submit(job(rounds=500))
        await world.until(
            lambda: world.job_state(name) == "running" and world.coordinator.jobs.runner is not None
        )
        world.coordinator.jobs.cancel(name)
        await world.until(lambda: world.agents["d0"][0].status.get("job_state") == "cancelled")
        await world.until(lambda: not list((tmp_path / "d0" / "jobs").glob(name)))
        await world.run(job(rounds=1))
