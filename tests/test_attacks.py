"""A device that lies about its update or its data, a fleet that is upgraded in pieces, and jobs that aim
at tags; over a real broker."""

import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import rankfleet.coordinator.rounds.closing
import rankfleet.federated.wire.messages
from rankfleet.coordinator.broker.child import mosquitto
from rankfleet.coordinator.jobs.spec import read_job
from rankfleet.coordinator.rounds.claimed_examples import bounds, notes
from rankfleet.coordinator.rounds.usual_norms import Usual
from rankfleet.coordinator.store import tables
from rankfleet.edge_agent.worker import worker
from rankfleet.federated.contract.tensors import Tensors
from rankfleet.federated.contract.update import Update
from rankfleet.federated.errors import WrongVersion
from rankfleet.federated.wire.messages import Leave, seal, unpack

from .secure import SecureWorld
from .world import WORDS, World, job, tiny_llama

KIND = "mosquitto" if mosquitto() else "amqtt"
KEY = b"k" * 32
CHATS = [
    {"messages": [{"role": "user", "content": "red"}, {"role": "assistant", "content": w}]} for w in WORDS * 3
]


@pytest.mark.parametrize("first", [0, 2])
async def test_ten_times_the_norm(
    tmp_path: Path, tiny: Path, first: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Over real Mosquitto; in the first round, when nothing is known yet, and in a later one. The others'
    round goes on without it."""
    real = worker.LocalRound.train

    def train(self: Any) -> Tensors:
        sent = real(self)
        if self.device == "d3" and self.job.round >= first:
            sent = {k: 10 * t if k.startswith("d/") and t.dtype == np.float32 else t for k, t in sent.items()}
        return sent

    monkeypatch.setattr(worker.LocalRound, "train", train)
    async with SecureWorld(tmp_path, tiny, KIND, devices=5) as world:
        name = await world.run(job(rounds=first + 1, stack=[]))
        states = {
            (r["round"], r["device"]): r for r in world.coordinator.ledger.rows(tables.assignments, job=name)
        }
        assert states[first, "d3"]["state"] == "refused"
        assert "times the usual one" in states[first, "d3"]["reason"]
        assert {states[first, d]["state"] for d in ("d0", "d1", "d2", "d4")} == {"counted"}
        assert all(states[n, "d3"]["state"] == "counted" for n in range(first))


def update(norm: float, steps: int) -> Update:
    return Update("d", 1.0, {}, None, {}, {}, {}, {"steps": steps})  # type: ignore[arg-type]


def test_more_steps_are_not_suspected() -> None:
    usual = Usual([[1.0, 1.1, 0.9, 1.0]], 6.0)
    assert not usual.unknown
    assert usual.objects(update(40.0, 64), 40.0) == ""
    assert "7.0 times the usual one" in usual.objects(update(56.0, 64), 56.0)
    assert usual.remembered()[-1] == [5.0]
    assert Usual([[1.0] * 4], 0.0).objects(update(1e9, 1), 1e9) == ""
    assert Usual([[1.0] * 3], 6.0).unknown


async def test_jobs_aim_at_tags(tmp_path: Path, tiny: Path) -> None:
    world = World(tmp_path, tiny, devices=3)
    world.agent_changes = {"d0": {"tags": {"site": "lab", "gpu": "orin"}}, "d1": {"tags": {"site": "office"}}}
    async with world:
        name = await world.run(job(rounds=1, where={"site": "lab", "gpu": "*"}))
        assert {r["device"] for r in world.coordinator.ledger.rows(tables.assignments, job=name)} == {"d0"}
        plan = world.coordinator.jobs.plan(read_job(job(where={"site": "lab"})))
        assert (
            world.coordinator.devices.why_not("d1", plan) == "its tag `site` is 'office', the job wants 'lab'"
        )
        assert (
            world.coordinator.devices.why_not("d2", plan)
            == "its tag `site` is 'not set', the job wants 'lab'"
        )


def test_the_protocol_before_ours_is_understood(monkeypatch: pytest.MonkeyPatch) -> None:
    old = seal(Leave(), "d0", KEY)
    monkeypatch.setattr(rankfleet.federated.wire.messages, "PROTOCOL", 2)
    assert isinstance(rankfleet.federated.wire.messages.open_up(unpack(old), KEY), Leave)
    assert isinstance(rankfleet.federated.wire.messages.open_up(unpack(seal(Leave(), "d0", KEY)), KEY), Leave)
    monkeypatch.setattr(rankfleet.federated.wire.messages, "PROTOCOL", 3)
    monkeypatch.setattr(rankfleet.federated.wire.messages, "OLDEST", 2)
    with pytest.raises(WrongVersion, match="speaks protocol 1, this side speaks 2 and 3"):
        unpack(old)


@pytest.mark.skipif(mosquitto() is None, reason="Mosquitto is not installed")
async def test_a_broker_whose_stored_messages_were_tampered_with(tmp_path: Path, tiny: Path) -> None:
    """Whoever holds the broker's disk changes the retained assignment, one bit at a time: it is dropped,
    and told again."""
    async with SecureWorld(tmp_path, tiny, "mosquitto", devices=1) as world:
        heard: list[bytes] = []
        agent = world.agents["d0"][0]
        real = agent._take

        def take(topic: str, payload: bytes) -> None:
            if topic.endswith("/job") and len(heard) < 40:
                heard.append(payload)
                at = 7 * len(heard) % len(payload)
                payload = payload[:at] + bytes([payload[at] ^ 4]) + payload[at + 1 :]
                runs = agent.engine.runs
                real(topic, payload)
                assert agent.engine.runs == runs
                return
            real(topic, payload)

        topic = agent.topics.device("d0", "job")
        agent.bus._handlers[topic] = take
        name = world.coordinator.jobs.submit(job(rounds=1))
        await world.until(lambda: bool(heard))
        for _ in range(39):
            take(topic, heard[0])
        assert agent._assignment is None
        agent.bus._handlers[topic] = real
        await world.until(lambda: world.job_state(name) == "finished")


async def test_pickled_checkpoints_remote_code_and_hostile_templates(tmp_path: Path) -> None:
    """What a base model could bring along never runs; the job says why it fails, and the service goes on."""
    folder = tiny_llama(tmp_path / "hostile")
    mark = tmp_path / "owned"

    class Bomb:
        def __reduce__(self) -> Any:
            return (mark.write_text, ("owned",))

    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb()))
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {"AutoModelForCausalLM": "evil.Model", "AutoConfig": "evil.Config"}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "evil.py").write_text(f"open({str(mark)!r}, 'w').write('owned')\n")
    template = (
        "{{ ''.__class__.__mro__[1].__subclasses__() }}{% for m in messages %}{{ m.content }}{% endfor %}"
    )
    for name in ("chat_template.jinja", "tokenizer_config.json"):
        if (folder / name).exists():
            said = (folder / name).read_text()
            (folder / name).write_text(
                template
                if name.endswith("jinja")
                else json.dumps({**json.loads(said), "chat_template": template})
            )
    (folder / "chat_template.jinja").write_text(template)
    world = World(tmp_path / "w", folder, devices=1, task="causal_lm")
    world.data["d0"].write_text("\n".join(json.dumps(q) for q in CHATS))
    async with world:
        text = job(
            rounds=1,
            task={"dataset": "words", "kind": "causal_lm", "template": "chat", "max_length": 32},
            deadline_s=1,
            quorum=0.1,
        )
        name = world.coordinator.jobs.submit(text)
        await world.until(lambda: world.coordinator.ledger.rows(tables.events, job=name) != [])
        reason = str(world.coordinator.ledger.rows(tables.events, job=name)[0]["text"])
        assert "the tokenizer's chat template does not take a row" in reason
        assert "unsafe" in reason
        world.coordinator.jobs.cancel(name)
        assert not mark.exists()


async def test_a_coordinator_that_asks_for_less_than_the_device_requires(
    tmp_path: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The owner's method is applied whatever the job says; leaving it out of the assignment does not help."""
    used: dict[str, list[str]] = {}
    real = worker.LocalRound.train

    def train(self: Any) -> Tensors:
        used[self.device] = list(self.client.stack.methods)
        assert list(self.job.stack) == []
        return real(self)

    monkeypatch.setattr(worker.LocalRound, "train", train)
    world = SecureWorld(tmp_path, tiny, KIND, devices=2)
    world.agent_changes = {"d1": {"require": ("fedprox",)}}
    async with world:
        await world.run(job(rounds=1))
    assert used == {"d0": [], "d1": ["fedprox"]}


def test_claims_out_of_proportion() -> None:
    said = {"a": 100.0, "b": 120.0, "c": 80.0, "liar": 1e7}
    allowed = bounds(said, {}, 10.0)
    assert allowed["liar"] == 1100.0
    assert min(allowed.values()) == 1100.0
    again = bounds({**said, "a": 900.0}, {"a": 100.0, "liar": 90.0}, 10.0)
    assert (again["a"], again["liar"]) == (2 * 510.0, 2 * 510.0)
    assert dict(notes({"a": 900.0}, {"a": 100.0}, {"a": 200.0})) == {
        "a": "of the 900 examples that it claims 200 count"
    }
    assert [t for _, t in notes({"a": 30.0}, {"a": 100.0}, {})] == ["it claims 30 examples, 100 before"]
    assert bounds(said, {}, 0.0) == {}


async def test_a_device_that_claims_a_million_examples_weighs_ten(
    tmp_path: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, weights = worker.LocalRound.train, {}

    def train(self: Any) -> Tensors:
        sent = real(self)
        self.told["examples"] = 10**6 if self.device == "d2" else self.told["examples"]
        return sent

    lift = rankfleet.coordinator.rounds.closing.lifted

    def lifted(*args: Any) -> Any:
        made = lift(*args)
        weights[made.device] = made.weight
        return made

    monkeypatch.setattr(worker.LocalRound, "train", train)
    monkeypatch.setattr(rankfleet.coordinator.rounds.closing, "lifted", lifted)
    async with World(tmp_path, tiny, devices=3) as world:
        name = await world.run(job(rounds=1))
        told = [
            e["text"] for e in world.coordinator.ledger.rows(tables.events, job=name) if e["device"] == "d2"
        ]
    assert weights["d2"] == 10 * max(weights["d0"], weights["d1"])
    assert "of the 1000000 examples that it claims" in told[0]
