"""An adapter as GGUF LoRA, as llama.cpp reads it: `llama-cli -m base.gguf --lora adapter.gguf`.

Rules of the format (llama.cpp, src/llama-adapter.cpp): metadata `general.type = adapter`, `adapter.type =
lora`, `adapter.lora.alpha`; for every adapted tensor `<name>.lora_a` (r, in) and `<name>.lora_b` (out, r),
named as in the base's GGUF; what is applied is alpha/r·B·A with r of that tensor. There is one alpha for
all, so unequal ranks are padded to the largest. Llama-like bases interleave the rows of q and k for their
rotary embedding, and so does B here.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from rankfleet.federated.contract.tensors import Array
from rankfleet.federated.contract.update import LowRank
from rankfleet.federated.errors import ConfigError
from rankfleet.federated.peft_format import used_pairs

ARCHITECTURES = {"mistral": "llama", "smollm": "llama", "gemma": "gemma", "phi3": "phi3"}
"""Hugging Face model type → GGUF architecture, where the names differ."""


def write_gguf(to: Path, pairs: Mapping[str, LowRank], scale: float, base: Path, name: str) -> Path:
    """Write `to` (or `to/adapter.gguf`, if it is a folder); returns the file. Raises ConfigError."""
    gguf, file = package(), file_in(to, "adapter.gguf")
    config = json.loads((base / "config.json").read_text(encoding="utf-8"))
    arch = ARCHITECTURES.get(config["model_type"], config["model_type"])
    known = {v: k for k, v in gguf.MODEL_ARCH_NAMES.items()}
    if arch not in known:
        raise ConfigError(f"llama.cpp has no architecture `{arch}`", "export as peft or merged instead")
    names = gguf.get_tensor_name_map(
        known[arch], config.get("num_hidden_layers") or config.get("n_layer") or 0
    )
    used = used_pairs(pairs)
    rank = max(p.A.shape[0] for p in used.values())
    file.parent.mkdir(parents=True, exist_ok=True)
    writer = gguf.GGUFWriter(file, arch)
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_name(name)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, scale * rank)
    for module, pair in used.items():
        found = names.get_name(f"{module}.weight", try_suffixes=(".weight",))
        if found is None:
            raise ConfigError(
                f"llama.cpp has no name for `{module}` of `{arch}`", "export as peft or merged instead"
            )
        b, a = _padded(pair, rank)
        if arch == "llama" and module.endswith(("q_proj", "k_proj")):
            heads = (
                config["num_attention_heads"]
                if module.endswith("q_proj")
                else config.get("num_key_value_heads")
            )
            b = interleaved(b, heads or config["num_attention_heads"])
        stem = found.removesuffix(".weight") + ".weight"
        writer.add_tensor(f"{stem}.lora_a", np.ascontiguousarray(a, np.float32))
        writer.add_tensor(f"{stem}.lora_b", np.ascontiguousarray(b, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def package() -> Any:
    """The package gguf. Raises ConfigError where it is not installed."""
    try:
        import gguf
    except ImportError:
        raise ConfigError("exporting to GGUF needs the package gguf", "pip install gguf") from None
    return gguf


def file_in(to: Path, name: str) -> Path:
    """`to` itself where it names a GGUF file, else `name` in that folder."""
    return to if to.suffix == ".gguf" else to / name


def _padded(pair: LowRank, rank: int) -> LowRank:
    extra = rank - pair.A.shape[0]
    return LowRank(np.pad(pair.B, ((0, 0), (0, extra))), np.pad(pair.A, ((0, extra), (0, 0))))


def interleaved(b: Array, heads: int) -> Array:
    """Rows of each head from (first half, second half) to (pairs), as llama.cpp keeps q and k of
    Llama-like models."""
    out, rank = b.shape
    turned: Array = b.reshape(heads, 2, out // heads // 2, rank).swapaxes(1, 2).reshape(out, rank)
    return turned
