"""A fleet in one process: real coordinator, real agents, real training, over a MemoryBus; only the process
boundary is missing."""

import asyncio
import contextlib
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import yaml

from rankfleet.coordinator.config import CoordinatorConfig, Limits
from rankfleet.coordinator.service import Service
from rankfleet.coordinator.store import tables
from rankfleet.edge_agent.config import AgentConfig, Dataset, Link
from rankfleet.edge_agent.order import Order
from rankfleet.edge_agent.service import Agent
from rankfleet.edge_agent.supervise.process import EngineFailed
from rankfleet.edge_agent.trust import identity
from rankfleet.federated.errors import DoesNotFit, RankfleetError, Refused
from rankfleet.federated.transport.memory import MemoryBroker, MemoryBus
from rankfleet.federated.wire.states import ENDED
from rankfleet.profiles.device import DeviceProfile, library

WORDS = ["red", "green", "blue", "sun", "moon", "star", "cat", "dog", "bird", "tree", "rock", "sea"]
LABELS = ["colour", "sky", "animal", "land"]


def word_tokenizer(words: list[str], **special: str) -> Any:
    """One token for each word, behind [PAD], [UNK], [CLS] and [SEP]."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocab = {w: i for i, w in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", *words])}
    made = Tokenizer(models.WordLevel(vocab, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    known = {"pad_token": "[PAD]", "unk_token": "[UNK]", **special}
    return PreTrainedTokenizerFast(tokenizer_object=made, **known)


def tiny_bert(folder: Path, layers: int = 2, **changes: int) -> Path:
    """Random weights, seeded; 16 wide, 40 channels, or as `changes` say."""
    import torch
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    shape = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 40, **changes}
    config = BertConfig(
        vocab_size=len(WORDS) + 4,
        num_hidden_layers=layers,
        max_position_embeddings=32,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        pad_token_id=0,
        **shape,
    )
    BertModel(config).save_pretrained(folder)
    word_tokenizer(WORDS).save_pretrained(folder)
    return folder


def tiny_vit(folder: Path) -> Path:
    """A two-layer ViT for one-channel 8x8 images."""
    import torch
    from transformers import ViTConfig, ViTModel

    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=48,
        image_size=8,
        patch_size=2,
        num_channels=1,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    ViTModel(config, add_pooling_layer=False).save_pretrained(folder)
    return folder


CHAT = (
    "{% for m in messages %}{{ m.role }} : {{ m.content }} [SEP] {% endfor %}"
    "{% if add_generation_prompt %}assistant : {% endif %}"
)


def tiny_llama(folder: Path, family: str = "llama") -> Path:
    """A two-layer causal model from a config, with a tokenizer that has a chat template."""
    import torch
    from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig

    torch.manual_seed(0)
    words = [*WORDS, "Instruction", "Input", "Answer", "user", "assistant", ":"]
    size = len(words) + 4
    config = (
        GPT2Config(
            vocab_size=size,
            n_embd=16,
            n_layer=2,
            n_head=2,
            n_positions=64,
            bos_token_id=2,
            eos_token_id=3,
            initializer_range=0.3,
        )
        if family == "gpt2"
        else LlamaConfig(
            vocab_size=size,
            hidden_size=16,
            intermediate_size=40,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=64,
            bos_token_id=2,
            eos_token_id=3,
            tie_word_embeddings=True,
            initializer_range=0.3,
        )
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer = word_tokenizer(words, eos_token="[SEP]")
    tokenizer.chat_template = CHAT
    tokenizer.save_pretrained(folder)
    return folder


def questions(count: int, seed: int) -> list[dict[str, str]]:
    """The answer depends on whether there is an input: what a random two-layer model can learn in a
    minute."""
    rng = random.Random(seed)
    said = [" ".join(rng.choice(WORDS[:6]) for _ in range(2)) for _ in range(count)]
    return [
        {"instruction": t, "input": rng.choice(WORDS[8:]) if i % 2 else "", "output": WORDS[6 + i % 2]}
        for i, t in enumerate(said)
    ]


def rows(count: int, seed: int, tilt: int = 0) -> list[dict[str, str]]:
    """Sentences whose label is the group that most of their words come from."""
    rng = random.Random(seed)
    found = []
    for _ in range(count):
        label = rng.choice([0, 1, 2, 3, tilt % 4])
        group = WORDS[3 * label : 3 * label + 3]
        text = " ".join(rng.choice(group if rng.random() < 0.8 else WORDS) for _ in range(6))
        found.append({"text": f"{text} {rng.choice(WORDS)} {rng.choice(WORDS)}", "label": LABELS[label]})
    return found


def job(**changes: Any) -> str:
    """A job for the small world; keyword arguments replace keys."""
    data: dict[str, Any] = {
        "name": "toy",
        "model": "tiny",
        "task": {"dataset": "words", "labels": LABELS, "max_length": 16},
        "rounds": 3,
        "adapter": {"targets": ["all"], "max_depth": 2},
        "arms": {"ranks": [2, 4], "bits": [32], "steps": [2], "batch": 4},
        "policy": {"name": "fixed"},
        "training": {"lr": 0.01, "evaluate": 8, "probe": 4},
        "deadline_s": 0,
        "stack": [],
    }
    return yaml.safe_dump({**data, **changes})


class InlineEngine:
    """The worker's own code in this process. `before` may raise, to play a crash."""

    def __init__(self) -> None:
        from rankfleet.edge_agent.worker.worker import Worker

        self.worker = Worker()
        self.runs = 0
        self.before: Callable[[Order], None] | None = None

    async def run(self, order: Order, progress: Any) -> None:
        self.runs += 1
        if self.before:
            self.before(order)
        await asyncio.sleep(0)
        try:
            self.worker.run(order, progress)
            self.worker.idle()
        except (DoesNotFit, MemoryError) as error:
            raise EngineFailed("memory", str(error)) from None
        except Refused as error:
            raise EngineFailed("data", str(error)) from None
        except RankfleetError as error:
            raise EngineFailed("job", str(error)) from None

    async def stop(self) -> None:
        return None


class World:
    """A coordinator and its devices. `kill` drops a side without a farewell; `start_*` brings it back from
    disk."""

    def __init__(
        self,
        home: Path,
        model: Path,
        *,
        devices: int = 3,
        broker: MemoryBroker | None = None,
        packet: int = 2000,
        budgets: dict[str, float] | None = None,
        task: str = "text_classification",
    ) -> None:
        self.home, self.model, self.packet, self.task = home, model, packet, task
        self.broker = broker or MemoryBroker()
        self.names = [f"d{i}" for i in range(devices)]
        self.budgets = budgets or {}
        self.service: Service | None = None
        self.database = ""
        self.agents: dict[str, tuple[Agent, asyncio.Task[None]]] = {}
        self.agent_changes: dict[str, Any] = {}
        self.data: dict[str, Path] = {}
        for i, name in enumerate(self.names):
            self.data[name] = home / f"{name}.jsonl"
            home.mkdir(parents=True, exist_ok=True)
            self.data[name].write_text("\n".join(json.dumps(r) for r in rows(60 + 20 * i, seed=i, tilt=i)))

    async def __aenter__(self) -> "World":
        await self.start_coordinator()
        for name in self.names:
            self.enrol(name)
            await self.start_agent(name)
        await self.until(lambda: all(d["state"] == "enrolled" for d in self.coordinator.devices.table()))
        return self

    async def __aexit__(self, *error: object) -> None:
        for name in list(self.agents):
            await self.kill_agent(name)
        await self.kill_coordinator()

    @property
    def coordinator(self) -> Service:
        assert self.service is not None
        return self.service

    def bus(self, name: str) -> Any:
        """A connection for one of the programs."""
        return MemoryBus(self.broker)

    async def start_coordinator(self) -> None:
        config = CoordinatorConfig(
            data_dir=str(self.home / "coordinator"),
            database=self.database,
            models={"tiny": str(self.model)},
            limits=Limits(packet_bytes=self.packet, gather_ms=1, nudge_s=0.5),
        )
        self.service = Service(config, self.bus("coordinator"), "mqtt://localhost")
        await self.service.start()

    async def kill_coordinator(self) -> None:
        if self.service is not None:
            await self.service.stop()
            self.service = None

    def enrol(self, name: str) -> None:
        identity.enroll(self.coordinator.invite(name), self.home / name)

    def agent_config(self, name: str) -> AgentConfig:
        config = AgentConfig(
            state_dir=str(self.home / name),
            datasets={"words": Dataset(str(self.data[name]), task=self.task)},
            models={"tiny": str(self.model)},
            link=Link(packet_bytes=self.packet, answer_s=0.3),
        )
        return msgspec.structs.replace(config, **self.agent_changes.get(name, {}))

    async def start_agent(self, name: str) -> Agent:
        profile: DeviceProfile = msgspec.structs.replace(
            library()["laptop-x86-16gb"],
            name="laptop-x86-16gb",
            threads=1,
            model_budget_mb=self.budgets.get(name, 100.0),
        )
        agent = Agent(
            identity.load(self.home / name),
            self.agent_config(name),
            self.bus(name),
            InlineEngine(),
            msgspec.to_builtins(profile),
            {},
        )
        self.agents[name] = (agent, asyncio.create_task(agent.run(), name=name))
        await asyncio.sleep(0)
        return agent

    async def kill_agent(self, name: str) -> None:
        agent, task = self.agents.pop(name)
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
        for other in list(agent._tasks):
            other.cancel()

    async def until(self, done: Callable[[], bool], seconds: float = 60.0) -> None:
        end = asyncio.get_running_loop().time() + seconds
        while not done():
            assert asyncio.get_running_loop().time() < end, "it did not happen in time"
            await asyncio.sleep(0.01)

    def job_state(self, name: str) -> str:
        row = self.coordinator.ledger.row(tables.jobs, id=name)
        return "" if row is None else str(row["state"])

    async def run(self, text: str, seconds: float = 90.0) -> str:
        """Submit and wait for the end; returns the job's id."""
        name = self.coordinator.jobs.submit(text)
        await self.until(lambda: self.service is not None and self.job_state(name) in ENDED, seconds)
        row = self.coordinator.ledger.row(tables.jobs, id=name)
        assert row is not None
        assert row["state"] == "finished", row["reason"]
        return name

    def digest(self, name: str) -> str:
        """Digest of the last version."""
        return str(self.coordinator.ledger.rows(tables.versions, job=name)[-1]["digest"])
