"""Base and adapter as one model that plain transformers loads, whole or physically smaller.

Cut, every layer keeps as many heads and channels as the others, so `config.json` can say so where the
architecture has a head size of its own. transformers takes only numbers of heads that divide the hidden
size; where the ratio asks for another, some more are kept.
"""

import json
import math
import shutil
import struct
from pathlib import Path
from typing import Any

from rankfleet.federated.errors import ConfigError
from rankfleet.federated.program.files import sync_folder, write_atomic
from rankfleet.profiles.memory import kept

from ..store.versions import Version
from .weights import Weights

OWN_HEAD_SIZE = ("llama", "mistral", "qwen2", "qwen3", "gemma")
"""Architectures whose configuration names the size of a head beside their number."""
BESIDE = (".json", ".txt", ".model", ".jinja")
BYTES = {"F64": 8, "I64": 8, "F32": 4, "I32": 4, "F16": 2, "BF16": 2}


def write_folder(version: Version, base: Path, to: Path, ratio: float, scale: float) -> dict[str, float]:
    """W + s·B·A of every map, cut to what a device at `ratio` keeps. Returns sizes before and after.
    Raises ConfigError."""
    weights = Weights(version, base, ratio, scale, even=True)  # transformers refuses other numbers of heads
    card = weights.card
    if ratio and card.groups > 1 and card.family not in OWN_HEAD_SIZE and weights.groups < card.groups:
        raise ConfigError(
            f"no configuration of a `{card.family}` model can express {weights.groups} of {card.groups} "
            "heads",
            "--format onnx, which needs none" if not card.causal else "leave --ratio out: the whole model",
        )
    to.mkdir(parents=True, exist_ok=True)
    copy_beside(base, to)
    if ratio:
        write_atomic(to / "config.json", json.dumps(_config(base, weights), indent=1).encode())
    size = _write(to / "model.safetensors", weights)
    sync_folder(to)
    before = sum(f.stat().st_size for f in base.glob("*.safetensors"))
    return {"before_mb": before / 1e6, "after_mb": size / 1e6}


def copy_beside(base: Path, to: Path) -> None:
    """Configuration and tokenizer."""
    for file in sorted(
        p for p in base.iterdir() if p.is_file() and p.suffix in BESIDE and not p.name.endswith(".index.json")
    ):
        shutil.copyfile(file, to / file.name)


def _config(base: Path, weights: Weights) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((base / "config.json").read_text(encoding="utf-8"))
    card, groups = weights.card, weights.groups
    ups, _ = card.channels(0)
    width = (
        "intermediate_size"
        if "intermediate_size" in config
        else "ffn_dim"
        if "ffn_dim" in config
        else "n_inner"
    )
    config[width] = kept(ups[0].out, weights.ratio)
    if card.family in OWN_HEAD_SIZE:
        config |= {
            "num_attention_heads": groups * (card.heads // card.groups), "num_key_value_heads": groups,
            "head_dim": card.head_size,
        }  # fmt: skip
    return config


def _write(path: Path, weights: Weights) -> int:
    """One safetensors file, a tensor at a time; NumPy has no bf16, so the format's own writer would not
    do."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, place in weights.places.items():
        size = math.prod(place.shape) * BYTES.get(place.entry.dtype, 1)
        header[name] = {"dtype": place.entry.dtype, "shape": place.shape, "data_offsets": [at, at + size]}
        at += size
    head = json.dumps(header, separators=(",", ":")).encode()
    head += b" " * (-len(head) % 8)
    new = path.with_name(f".{path.name}.new")
    with new.open("wb") as file:
        file.write(struct.pack("<Q", len(head)) + head)
        for place in weights.places.values():
            file.write(weights.stored(place).data)
    new.replace(path)
    return path.stat().st_size
