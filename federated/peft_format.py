"""A global adapter as a folder that plain peft loads: `PeftModel.from_pretrained(base, folder)`.

Beside it the head as safetensors and a ten-line `load.py` that puts the two together: mean pooling and a
linear map.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save

from .contract.tensors import Tensors
from .contract.update import LowRank
from .program.files import sync_files, write_atomic
from .tasks import modules, task_kind

LOAD = '''"""Loads this adapter with plain transformers and peft.

`predict = load("path/to/base")`, then `predict(["some text"])`.
"""
import json, pathlib, torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModel, AutoTokenizer

def load(base, folder=pathlib.Path(__file__).parent):
    model = PeftModel.from_pretrained(AutoModel.from_pretrained(base), folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(base)
    head, task = load_file(folder / "head.safetensors"), json.loads((folder / "task.json").read_text())
    @torch.inference_mode()
    def predict(texts):
        cut = {"truncation": True, "max_length": task["max_length"]}
        batch = tokenizer(texts, padding=True, return_tensors="pt", **cut)
        hidden, mask = model(**batch).last_hidden_state, batch["attention_mask"].unsqueeze(-1)
        logits = (hidden * mask).sum(1) / mask.sum(1) @ head["head.weight"].T + head["head.bias"]
        return [task["labels"][i] for i in logits.argmax(-1)] if task["labels"] else logits[:, 0].tolist()
    return predict
'''


LOAD_MERGED = '''"""Loads this model and its head with plain transformers.

`predict = load()`, then `predict(["some text"])`.
"""
import json, pathlib, torch
from safetensors.torch import load_file
from transformers import AutoModel, AutoTokenizer

def load(folder=pathlib.Path(__file__).parent):
    model, tokenizer = AutoModel.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    saved = load_file(folder / "head" / "head.safetensors")
    task = json.loads((folder / "task.json").read_text())
    @torch.inference_mode()
    def predict(texts):
        cut = {"truncation": True, "max_length": task["max_length"]}
        batch = tokenizer(texts, padding=True, return_tensors="pt", **cut)
        hidden, mask = model(**batch).last_hidden_state, batch["attention_mask"].unsqueeze(-1)
        logits = (hidden * mask).sum(1) / mask.sum(1) @ saved["head.weight"].T + saved["head.bias"]
        return [task["labels"][i] for i in logits.argmax(-1)] if task["labels"] else logits[:, 0].tolist()
    return predict
'''
LOAD_CAUSAL = '''"""Loads this adapter with plain transformers and peft.

`answer = load("path/to/base")`, then `answer("Instruction: …")`.
"""
import pathlib, torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

def load(base, folder=pathlib.Path(__file__).parent):
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(base)
    @torch.inference_mode()
    def answer(prompt, tokens=64):
        batch = tokenizer(prompt, return_tensors="pt")
        made = model.generate(**batch, max_new_tokens=tokens, do_sample=False)
        return tokenizer.decode(made[0, batch["input_ids"].shape[1]:], skip_special_tokens=True)
    return answer
'''


def used_pairs(pairs: Mapping[str, LowRank]) -> dict[str, LowRank]:
    """The pairs that change anything; one of them where none does, so that the files stay readable."""
    return {m: p for m, p in sorted(pairs.items()) if np.any(p.B)} or dict(sorted(pairs.items())[:1])


def head_files(dense: Tensors, task: dict[str, Any], program: str) -> dict[str, bytes]:
    """What lies beside the weights: the head, what it means, and how to load it; no program where the tool
    needs none."""
    where = "head/head.safetensors" if program == LOAD_MERGED else "head.safetensors"
    files = {"task.json": json.dumps(task, indent=1).encode()} | (
        {"load.py": program.encode()} if program else {}
    )
    if dense:
        files[where] = save(
            {k: np.ascontiguousarray(v, np.float32) for k, v in dense.items()}, {"format": "pt"}
        )
    return files


def write_adapter(
    folder: Path,
    pairs: Mapping[str, LowRank],
    dense: Tensors,
    *,
    scale: float,
    base: str,
    task: dict[str, Any],
    transposed: bool = False,
) -> None:
    """Write `adapter_config.json`, `adapter_model.safetensors`, `head.safetensors`, `task.json` and
    `load.py`.

    `transposed`: the base keeps its linear maps as (in, out), as GPT-2 does.
    """
    used = used_pairs(pairs)
    kind = str(task.get("kind", ""))
    causal = kind in modules() and task_kind(kind).causal
    ranks = {m: int(p.A.shape[0]) for m, p in used.items()}
    top = max(ranks.values())
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM" if causal else "FEATURE_EXTRACTION",
        "base_model_name_or_path": base,
        "inference_mode": True,
        "r": top,
        "lora_alpha": scale * top,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": transposed,
        "target_modules": sorted(used),
        "rank_pattern": {m: r for m, r in ranks.items() if r != top},
        "alpha_pattern": {m: scale * r for m, r in ranks.items() if r != top},
        "init_lora_weights": True,
    }
    weights = {}
    for module, pair in used.items():
        weights[f"base_model.model.{module}.lora_A.weight"] = np.ascontiguousarray(pair.A, np.float32)
        weights[f"base_model.model.{module}.lora_B.weight"] = np.ascontiguousarray(pair.B, np.float32)
    files = {
        "adapter_config.json": json.dumps(config, indent=1).encode(),
        "adapter_model.safetensors": save(weights, {"format": "pt"}),
        **head_files(dense, task, LOAD_CAUSAL if causal else LOAD),
    }
    for name, data in files.items():
        write_atomic(folder / name, data, durable=False)
    # A version is only pointed to after this: all of it is on disk, at the price of one wait for each file
    # and not three.
    sync_files([folder / name for name in files])
