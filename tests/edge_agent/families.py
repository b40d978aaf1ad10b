"""Small random models of every family that the engine knows, as transformers writes them."""

from pathlib import Path
from typing import Any

import torch

WIDE = {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "vocab_size": 61,
    "pad_token_id": 1,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "bert": WIDE, "roberta": {**WIDE, "max_position_embeddings": 40},
    "gpt2": {"n_embd": 32, "n_layer": 3, "n_head": 4, "vocab_size": 61, "n_positions": 40},
    "opt": {**{k: v for k, v in WIDE.items() if k != "intermediate_size"}, "ffn_dim": 48,
    "word_embed_proj_dim": 32},
    "llama": {**WIDE, "num_key_value_heads": 2},
    "mistral": {**WIDE, "num_key_value_heads": 2, "sliding_window": 5},
    "qwen2": {**WIDE, "num_key_value_heads": 2, "tie_word_embeddings": True},
    "qwen3": {**WIDE, "num_key_value_heads": 2, "head_dim": 16},
    "gemma": {**WIDE, "num_key_value_heads": 1, "head_dim": 16},
    "phi": {**WIDE, "partial_rotary_factor": 0.5},
}  # fmt: skip
ENCODERS = ("bert", "roberta")


def make(family: str, folder: Path) -> Path:
    """A model with weights large enough that every part of it matters. Biases and norms are random too."""
    from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

    torch.manual_seed(7)
    config = AutoConfig.for_model(family, **FAMILIES[family])
    model = (AutoModel if family in ENCODERS else AutoModelForCausalLM).from_config(config)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.add_(torch.randn_like(p) * (0.1 if "norm" in name.lower() or p.dim() == 1 else 0.15))
    model.save_pretrained(folder)
    return folder
