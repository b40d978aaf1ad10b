"""A decoder with its adapter in it as one GGUF file for llama.cpp, whole or physically smaller;
`llama-quantize` makes it smaller still.

Rules of the format (llama.cpp, docs/gguf.md and its converter's conventions): numbers under `<arch>.…`,
tensors by llama.cpp's names in the checkpoint's precision, one-dimensional ones in fp32; Llama-like models
interleave the rows of q and k for their rotary embedding; norms of Gemma carry their 1. Two kinds of
tokenizer: byte-level BPE, and SentencePiece's BPE as `tokenizer.json` tells it.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np

from rankfleet.federated.contract.tensors import Array
from rankfleet.federated.errors import ConfigError
from rankfleet.profiles.architecture import Architecture, read_architecture

from .gguf_lora import ARCHITECTURES, file_in, interleaved, package
from .weights import Place, Weights

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gemma")
NORMAL, UNKNOWN, CONTROL, BYTE = 1, 2, 3, 6
"""Kinds of token."""
INSTEAD = "--format merged, then llama.cpp's convert_hf_to_gguf.py"


def write_model(weights: Weights, to: Path, name: str) -> Path:
    """Write `to` (or `to/model.gguf`, if it is a folder); returns the file. Raises ConfigError."""
    gguf, file = package(), file_in(to, "model.gguf")
    config = json.loads((weights.base / "config.json").read_text(encoding="utf-8"))
    kind = read_architecture(config)
    if kind is None or kind.family not in FAMILIES:
        raise ConfigError(f"a `{weights.card.family}` model is none that we can write as GGUF", INSTEAD)
    if kind.window and kind.window < config["max_position_embeddings"]:
        raise ConfigError(f"llama.cpp would ignore this model's window of {kind.window} tokens", INSTEAD)
    arch = architecture(weights, kind)
    tokens = _tokenizer(weights.base, kind.family)
    file.parent.mkdir(parents=True, exist_ok=True)
    writer = gguf.GGUFWriter(file, arch, use_temp_file=True)
    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_name(name)
    _numbers(writer, weights, kind, config)
    _words(writer, tokens, weights.base)
    names = gguf.get_tensor_name_map({v: k for k, v in gguf.MODEL_ARCH_NAMES.items()}[arch], kind.layers)
    for place in weights.places.values():
        _tensor(writer, weights, kind, place, names, arch == "llama")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def architecture(weights: Weights, kind: Architecture) -> str:
    """llama.cpp's name. Its qwen2 knows no head size of its own, its llama does, and takes biases: a
    pruned Qwen2 is written as that."""
    if kind.family == "qwen2" and weights.groups < kind.kv_heads:
        return "llama"
    return ARCHITECTURES.get(kind.family, kind.family)


def _numbers(writer: Any, weights: Weights, kind: Architecture, config: dict[str, Any]) -> None:
    each = kind.heads // kind.kv_heads
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(kind.hidden)
    writer.add_block_count(kind.layers)
    up = next(p for n, p in weights.places.items() if n.endswith(kind.names.up.format(l=0) + ".weight"))
    writer.add_feed_forward_length(up.shape[0])
    writer.add_head_count(weights.groups * each)
    writer.add_head_count_kv(weights.groups)
    writer.add_key_length(kind.head_size)
    writer.add_value_length(kind.head_size)
    writer.add_rope_dimension_count(kind.rotary)
    writer.add_rope_freq_base(kind.theta)
    writer.add_layer_norm_rms_eps(kind.eps)
    writer.add_vocab_size(config["vocab_size"])


def _tensor(writer: Any, weights: Weights, kind: Architecture, place: Place, names: Any, turns: bool) -> None:
    import gguf

    if place.name.endswith("rotary_emb.inv_freq"):
        return
    name = place.name
    if name == "lm_head.weight" and _tied(weights):
        if any(n.endswith(f"{kind.names.word}.weight") for n in weights.places):
            return
        name = f"model.{kind.names.word}.weight"  # the one table lies under the other's name
    found = names.get_name(name, try_suffixes=(".weight", ".bias"))
    if found is None:
        raise ConfigError(f"llama.cpp has no name for `{place.name}`", INSTEAD)
    values = weights.stored(place)
    if len(place.shape) == 1:
        values = weights.floats(place.name)
        plus = kind.norm_plus if "norm" in place.name else 0.0
        values = values + np.float32(plus)
    if turns and (".q_proj." in place.name or ".k_proj." in place.name):
        values = turned(
            values, weights.groups * (kind.heads // kind.kv_heads if ".q_proj." in place.name else 1)
        )
    raw = gguf.GGMLQuantizationType.BF16 if place.entry.dtype == "BF16" and len(place.shape) > 1 else None
    if raw is not None:  # as bytes: NumPy has no bf16
        values = values.view(np.uint8).reshape(*values.shape[:-1], -1)
    writer.add_tensor(found, np.ascontiguousarray(values), raw_dtype=raw)


def _tied(weights: Weights) -> bool:
    config = json.loads((weights.base / "config.json").read_text(encoding="utf-8"))
    return bool(config.get("tie_word_embeddings"))


def turned(values: Array, heads: int) -> Array:
    """Rows of q or k (or their bias) as llama.cpp's rotary embedding wants them."""
    return interleaved(values if values.ndim > 1 else values[:, None], heads).reshape(values.shape)


def _tokenizer(base: Path, family: str) -> dict[str, Any]:
    """What GGUF says of a tokenizer, by key: kind, tokens, types, and scores or merges. Raises
    ConfigError."""
    try:
        told = json.loads((base / "tokenizer.json").read_text(encoding="utf-8"))
        model = told["model"]
        vocab: dict[str, int] = dict(model["vocab"]) if model["type"] == "BPE" else {}
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(f"the base has no tokenizer.json that can be read: {error}", INSTEAD) from None
    size = json.loads((base / "config.json").read_text(encoding="utf-8"))["vocab_size"]
    added = {t["content"]: t["id"] for t in told.get("added_tokens", [])}
    special = {t["id"] for t in told.get("added_tokens", []) if t.get("special")}
    named = {i: w for w, i in {**vocab, **added}.items()}
    words = [named.get(i, f"[PAD{i}]") for i in range(size)]
    types = [CONTROL if i in special or i not in named else NORMAL for i in range(size)]
    merges = [m if isinstance(m, str) else " ".join(m) for m in model.get("merges") or []]
    split = json.dumps(told.get("pre_tokenizer"))
    found: dict[str, Any] = {"tokens": words, "types": types}
    if "ByteLevel" in split:
        return found | {"model": "gpt2", "pre": _pre(split, family), "merges": merges}
    if model["type"] != "BPE" or not model.get("byte_fallback"):
        raise ConfigError(
            f"a tokenizer of the kind {model['type']} is none that we can write as GGUF", INSTEAD
        )
    rank = {m.replace(" ", "", 1): -float(n) for n, m in enumerate(merges)}
    scores = [rank.get(w, -1e6 if i in special or w.startswith("<0x") else -1e5) for i, w in enumerate(words)]
    for i, w in enumerate(words):
        if w.startswith("<0x") and len(w) == 6:
            types[i] = BYTE
        elif w == model.get("unk_token"):
            types[i] = UNKNOWN
    return found | {
        "model": "llama",
        "scores": scores,
        "prefix": "Prepend" in json.dumps(told.get("normalizer")),
    }


def _pre(split: str, family: str) -> str:
    """llama.cpp's name for how text is split before the merges."""
    if family in ("qwen2", "qwen3"):
        return "qwen2"
    if "{1,3}" in split:
        return "llama-bpe"
    return "smollm" if "Digits" in split else "gpt-2"


def _words(writer: Any, tokens: dict[str, Any], base: Path) -> None:
    writer.add_tokenizer_model(tokens["model"])
    writer.add_token_list(tokens["tokens"])
    writer.add_token_types(tokens["types"])
    if "merges" in tokens:
        writer.add_tokenizer_pre(tokens["pre"])
        writer.add_token_merges(tokens["merges"])
    else:
        writer.add_token_scores(tokens["scores"])
        writer.add_add_space_prefix(tokens["prefix"])
    config = json.loads((base / "config.json").read_text(encoding="utf-8"))
    beside = base / "tokenizer_config.json"
    told = json.loads(beside.read_text(encoding="utf-8")) if beside.exists() else {}
    ids = {w: i for i, w in reversed(list(enumerate(tokens["tokens"])))}
    for role in ("bos", "eos", "unk", "pad"):
        word = told.get(f"{role}_token")
        word = word.get("content") if isinstance(word, dict) else word
        number = ids.get(word, config.get(f"{role}_token_id"))
        if isinstance(number, int) and 0 <= number < len(tokens["tokens"]):
            getattr(writer, f"add_{role}_token_id")(number)
    for role in ("bos", "eos"):
        if isinstance(add := told.get(f"add_{role}_token"), bool):
            getattr(writer, f"add_add_{role}_token")(add)
    if isinstance(template := told.get("chat_template"), str):
        writer.add_chat_template(template)
