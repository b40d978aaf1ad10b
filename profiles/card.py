"""What a model is made of, read from its folder without loading it: `config.json` and the header of the
safetensors."""

import hashlib
import json
import re
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec

from .architecture import Architecture, read_architecture

_LAYER = re.compile(r"\.(\d+)\.")


class Module(msgspec.Struct, frozen=True, rename={"in_": "in"}):
    """One linear map inside a layer; `name` is that of its weight in the checkpoint, without `.weight`."""

    name: str
    layer: int
    out: int
    in_: int
    role: str
    """`q`, `k`, `v` or `qkv` (rows are heads), `o` (columns are), `up` (rows are FFN channels), `down`
    (columns are); `attention` where it is not known which, `other` for the rest."""


class ModelCard(msgspec.Struct, frozen=True):
    """Shapes of a model, enough to plan with."""

    name: str
    digest: str
    family: str
    layers: int
    hidden: int
    ffn: int
    heads: int
    vocab: int
    embedding: int
    """Parameters outside the layers."""
    modules: list[Module]
    causal: bool = False
    groups: int = 1
    """Key-value heads; each serves `heads / groups` query heads, and goes with them when it is pruned."""
    head_size: int = 1
    image_tokens: int = 0
    """Tokens of an image; 0: it reads texts, whose length the job says."""

    def of_layer(self, layer: int) -> list[Module]:
        """Linear maps of one layer."""
        return [m for m in self.modules if m.layer == layer]

    def channels(self, layer: int) -> tuple[list[Module], list[Module]]:
        """(up, down) maps of the layer's feed-forward channels; empty where there are none to prune."""
        here = self.of_layer(layer)
        return [m for m in here if m.role == "up"], [m for m in here if m.role == "down"]


def read_card(folder: Path) -> ModelCard:
    """The card of a Hugging Face model folder. Raises FileNotFoundError or ValueError with what is
    missing."""
    files = sorted(folder.glob("*.safetensors"))
    if not (folder / "config.json").exists() or not files:
        raise FileNotFoundError(
            f"{folder} needs config.json and *.safetensors; pickled weights are never loaded"
        )
    config: dict[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config = {**config, **config.get("text_config", {})}
    shapes = {k: s for file in files for k, s in header(file).items()}
    hidden = config.get("hidden_size") or config.get("n_embd") or config.get("dim") or 0
    ffn = config.get("intermediate_size") or config.get("n_inner") or config.get("ffn_dim") or 4 * hidden
    known = read_architecture(config)
    modules = list(_modules(shapes, hidden, ffn, config.get("model_type", ""), known))
    if not modules or not hidden:
        raise ValueError(
            f"{folder}: no layers found in {len(shapes)} tensors of a `{config.get('model_type')}` model"
        )
    inside = sum(m.out * m.in_ for m in modules)
    total = sum(_count(s) for s in shapes.values())
    return ModelCard(
        name=folder.name,
        digest=model_digest(folder),
        family=config.get("model_type", "?"),
        layers=1 + max(m.layer for m in modules),
        hidden=hidden,
        ffn=ffn,
        heads=config.get("num_attention_heads") or config.get("n_head") or 1,
        vocab=config.get("vocab_size", 0),
        embedding=total - inside,
        modules=modules,
        groups=known.kv_heads if known else 1,
        head_size=known.head_size if known else 1,
        image_tokens=(config.get("image_size", 224) // known.patch) ** 2 + 1 if known and known.patch else 0,
        causal=any("CausalLM" in a or "LMHead" in a for a in config.get("architectures") or []),
    )


def _modules(
    shapes: dict[str, list[int]], hidden: int, ffn: int, family: str, known: Architecture | None
) -> Iterator[Module]:
    named = known.roles() if known else {}
    transposed = family == "gpt2"
    for key in sorted(shapes):
        found = _LAYER.search(key)
        if not key.endswith(".weight") or not found or len(shapes[key]) != 2:
            continue
        out, in_ = reversed(shapes[key]) if transposed else shapes[key]
        role = "other"
        if out == ffn != hidden and in_ == hidden:
            role = "up"
        elif in_ == ffn != hidden and out == hidden:
            role = "down"
        elif in_ == hidden or out == hidden:
            role = "attention"
        name = key.removesuffix(".weight")
        pattern = f"{name[: found.start()]}.{{l}}.{name[found.end() :]}"
        role = next((r for p, r in named.items() if pattern.endswith(p)), role)
        yield Module(name, int(found.group(1)), out, in_, role)


def _count(shape: list[int]) -> int:
    n = 1
    for s in shape:
        n *= s
    return n


class Entry(msgspec.Struct, frozen=True):
    """Where a tensor lies in a safetensors file."""

    dtype: str
    shape: list[int]
    offset: int


def header(file: Path) -> dict[str, list[int]]:
    """Tensor name → shape, from a safetensors file's header."""
    return {k: e.shape for k, e in entries(file).items()}


def entries(file: Path) -> dict[str, Entry]:
    """Tensor name → dtype, shape and place in the file. Raises ValueError for another kind of file."""
    with file.open("rb") as f:
        (size,) = struct.unpack("<Q", f.read(8))
        if size > 100_000_000:
            raise ValueError(f"{file}: header of {size:,} bytes is not a safetensors header")
        found = json.loads(f.read(size))
    return {
        k: Entry(v["dtype"], v["shape"], 8 + size + v["data_offsets"][0])
        for k, v in found.items()
        if k != "__metadata__"
    }


def model_digest(folder: Path) -> str:
    """SHA-256 over weights, configuration and tokenizer: what must be equal on every device."""
    whole = hashlib.sha256()
    names = sorted(
        p.name
        for p in folder.iterdir()
        if p.suffix == ".safetensors" or p.name in ("config.json", "tokenizer.json", "vocab.txt")
    )
    for name in names:
        whole.update(name.encode() + b"\0")
        with (folder / name).open("rb") as f:
            while piece := f.read(1 << 20):
                whole.update(piece)
    return whole.hexdigest()
