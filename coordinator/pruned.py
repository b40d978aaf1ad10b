"""The product of pruning: base and adapter as one physically smaller model that plain transformers loads.

Every layer keeps as many heads and channels as the others, so `config.json` can say so where the architecture has a head size of its own.
Reads and writes safetensors tensor by tensor; needs neither torch nor transformers.
"""

import json
import shutil
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from federated.errors import ConfigError
from federated.files import sync_folder, write_atomic
from federated.peft_format import used_pairs
from federated.tensors import Array
from federated.update import LowRank, Masks
from profiles.card import Entry, ModelCard, entries, read_card
from profiles.memory import kept, kept_groups

from . import channels
from .registry import Version

OWN_HEAD_SIZE = ("llama", "mistral", "qwen2", "qwen3", "gemma")
"""Architectures whose configuration names the size of a head beside their number."""
KINDS = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2"}


def write_pruned(version: Version, base: Path, to: Path, ratio: float, scale: float) -> dict[str, float]:
    """W + s·B·A of every map, cut to what a device at `ratio` keeps. Returns sizes before and after. Raises ConfigError."""
    card = read_card(base)
    if not 0 < ratio < 1:
        raise ConfigError(f"ratio {ratio} is not between 0 and 1")
    if card.groups > 1 and card.family not in OWN_HEAD_SIZE and kept_groups(card.groups, ratio) < card.groups:
        raise ConfigError(
            f"no configuration of a `{card.family}` model can express {kept_groups(card.groups, ratio)} of {card.groups} heads",
            "leave --ratio out: the whole model",
        )
    order = version.state.get("importance")
    masks = channels.masks(card, channels.restored(order) if order else channels.importance(base, card), ratio)
    to.mkdir(parents=True, exist_ok=True)
    for file in sorted(p for p in base.iterdir() if p.is_file() and p.suffix in (".json", ".txt", ".model", ".jinja")):
        if not file.name.endswith(".index.json"):
            shutil.copyfile(file, to / file.name)
    tensors = dict(_tensors(base, card, masks, used_pairs(version.pairs), scale))
    size = _write(to / "model.safetensors", tensors)
    write_atomic(to / "config.json", json.dumps(_config(base, card, ratio), indent=1).encode())
    sync_folder(to)
    before = sum(f.stat().st_size for f in base.glob("*.safetensors"))
    return {"before_mb": before / 1e6, "after_mb": size / 1e6}


def _config(base: Path, card: ModelCard, ratio: float) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((base / "config.json").read_text(encoding="utf-8"))
    groups = kept_groups(card.groups, ratio)
    ups, _ = card.channels(0)
    width = "intermediate_size" if "intermediate_size" in config else "ffn_dim" if "ffn_dim" in config else "n_inner"
    config[width] = kept(ups[0].out, ratio)
    if card.family in OWN_HEAD_SIZE:
        config |= {
            "num_attention_heads": groups * (card.heads // card.groups), "num_key_value_heads": groups, "head_dim": card.head_size,
        }  # fmt: skip
    return config


def _tensors(base: Path, card: ModelCard, masks: Masks, pairs: dict[str, LowRank], scale: float) -> Iterator[tuple[str, tuple[str, Array]]]:
    """Name → (dtype, array as stored), merged and cut."""
    transposed = card.family == "gpt2"
    for file in sorted(base.glob("*.safetensors")):
        for name, entry in entries(file).items():
            stored = _stored(file, entry)
            stem, _, kind = name.rpartition(".")
            if kind == "weight" and stem in pairs:
                change = scale * (pairs[stem].B.astype(np.float64) @ pairs[stem].A.astype(np.float64))
                stored = _narrow(_wide(stored, entry.dtype) + (change.T if transposed else change), entry.dtype)
            rows, columns = masks.get(f"{stem}.out"), masks.get(f"{stem}.in")
            if kind == "bias" and rows is not None:
                stored = stored[rows]
            elif kind == "weight":
                if rows is not None:
                    stored = stored[:, rows] if transposed else stored[rows]
                if columns is not None:
                    stored = stored[columns] if transposed else stored[:, columns]
            yield name, (entry.dtype, np.ascontiguousarray(stored))


def _stored(file: Path, entry: Entry) -> Array:
    if entry.dtype not in KINDS:
        kinds = {"I64": "<i8", "I32": "<i4", "U8": "u1", "I8": "i1", "BOOL": "?"}
        if entry.dtype not in kinds:
            raise ConfigError(f"{file.name} holds weights as {entry.dtype}, which cannot be cut")
        return np.memmap(file, dtype=kinds[entry.dtype], mode="r", offset=entry.offset, shape=tuple(entry.shape))
    return np.memmap(file, dtype=KINDS[entry.dtype], mode="r", offset=entry.offset, shape=tuple(entry.shape))


def _wide(stored: Array, dtype: str) -> Array:
    if dtype == "BF16":
        return (stored.astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    return stored.astype(np.float64)


def _narrow(values: Array, dtype: str) -> Array:
    from .export import to_bf16

    return to_bf16(values.astype(np.float32)) if dtype == "BF16" else values.astype(KINDS[dtype])


def _write(path: Path, tensors: dict[str, tuple[str, Array]]) -> int:
    """A safetensors file; NumPy has no bf16, so its own writer would not do."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, (dtype, array) in tensors.items():
        header[name] = {"dtype": dtype, "shape": list(array.shape), "data_offsets": [at, at + array.nbytes]}
        at += array.nbytes
    head = json.dumps(header, separators=(",", ":")).encode()
    head += b" " * (-len(head) % 8)
    new = path.with_name(f".{path.name}.new")
    with new.open("wb") as file:
        file.write(struct.pack("<Q", len(head)) + head)
        for _, array in tensors.values():
            file.write(array.tobytes())
    new.replace(path)
    return path.stat().st_size
