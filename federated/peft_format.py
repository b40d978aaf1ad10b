"""A global adapter as a folder that plain peft loads: `PeftModel.from_pretrained(base, folder)`.

Beside it the head as safetensors and a ten-line `load.py` that puts the two together: mean pooling and a linear map.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save

from .files import write_atomic
from .tensors import Tensors
from .update import LowRank

LOAD = '''"""Loads this adapter with plain transformers and peft: `predict = load("path/to/base")`, `predict(["some text"])`."""
import json, pathlib, torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModel, AutoTokenizer

def load(base, folder=pathlib.Path(__file__).parent):
    model, tokenizer = PeftModel.from_pretrained(AutoModel.from_pretrained(base), folder).eval(), AutoTokenizer.from_pretrained(base)
    head, task = load_file(folder / "head.safetensors"), json.loads((folder / "task.json").read_text())
    @torch.inference_mode()
    def predict(texts):
        batch = tokenizer(texts, padding=True, truncation=True, max_length=task["max_length"], return_tensors="pt")
        hidden, mask = model(**batch).last_hidden_state, batch["attention_mask"].unsqueeze(-1)
        logits = (hidden * mask).sum(1) / mask.sum(1) @ head["head.weight"].T + head["head.bias"]
        return [task["labels"][i] for i in logits.argmax(-1)]
    return predict
'''


def write_adapter(folder: Path, pairs: Mapping[str, LowRank], dense: Tensors, *, scale: float, base: str, task: dict[str, Any]) -> None:
    """Write `adapter_config.json`, `adapter_model.safetensors`, `head.safetensors`, `task.json` and `load.py`."""
    used = {m: p for m, p in sorted(pairs.items()) if np.any(p.B)} or dict(sorted(pairs.items())[:1])
    ranks = {m: int(p.A.shape[0]) for m, p in used.items()}
    top = max(ranks.values())
    config = {
        "peft_type": "LORA",
        "task_type": "FEATURE_EXTRACTION",
        "base_model_name_or_path": base,
        "inference_mode": True,
        "r": top,
        "lora_alpha": scale * top,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "target_modules": sorted(used),
        "rank_pattern": {m: r for m, r in ranks.items() if r != top},
        "alpha_pattern": {m: scale * r for m, r in ranks.items() if r != top},
        "init_lora_weights": True,
    }
    weights = {}
    for module, pair in used.items():
        weights[f"base_model.model.{module}.lora_A.weight"] = np.ascontiguousarray(pair.A, np.float32)
        weights[f"base_model.model.{module}.lora_B.weight"] = np.ascontiguousarray(pair.B, np.float32)
    write_atomic(folder / "adapter_config.json", json.dumps(config, indent=1).encode())
    write_atomic(folder / "adapter_model.safetensors", save(weights, {"format": "pt"}))
    write_atomic(folder / "head.safetensors", save({k: np.ascontiguousarray(v, np.float32) for k, v in dense.items()}, {"format": "pt"}))
    write_atomic(folder / "task.json", json.dumps(task, indent=1).encode())
    write_atomic(folder / "load.py", LOAD.encode())
