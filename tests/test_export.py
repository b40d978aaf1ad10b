"""A version for other tools: peft, a whole model, GGUF; each read back by the tool's own code."""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from rankfleet.coordinator.cli import build
from rankfleet.coordinator.export import FORMATS, write
from rankfleet.coordinator.export.gguf_lora import interleaved
from rankfleet.coordinator.export.weights import to_bf16

from . import world as small
from .world import World, job, questions, rows


@pytest.fixture(scope="session", params=["llama", "gpt2"])
def causal(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small.tiny_llama(tmp_path_factory.mktemp(request.param), request.param)


async def tuned(home: Path, model: Path) -> Any:
    """A coordinator's configuration and a job that moved the adapter."""
    world = World(home, model, devices=2, task="causal_lm")
    for n, path in enumerate(world.data.values()):
        path.write_text("\n".join(json.dumps(q) for q in questions(60, n)))
    async with world:
        name = await world.run(
            job(
                task={"dataset": "words", "kind": "causal_lm", "max_length": 24}, rounds=2,
                training={"lr": 0.05},
                policy={"name": "ucb1"},
                arms={"ranks": [2, 4], "placements": ["rising(0..1, total=6)"], "bits": [32], "steps": [6],
                "batch": 8},
            )
        )  # fmt: skip
        return world.coordinator.config, name


def logits(model: Any) -> Any:
    with torch.inference_mode():
        return model(input_ids=torch.tensor([[4, 5, 6, 7, 8, 9]])).logits


async def test_merged_and_peft_are_the_same_model(tmp_path: Path, causal: Path) -> None:
    peft = pytest.importorskip("peft")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    config, name = await tuned(tmp_path, causal)
    write(config, name, tmp_path / "whole", kind="merged")
    write(config, name, tmp_path / "adapter")
    plain = AutoModelForCausalLM.from_pretrained(causal).eval()
    before = logits(plain)
    whole = logits(AutoModelForCausalLM.from_pretrained(tmp_path / "whole").eval())
    with_peft = logits(peft.PeftModel.from_pretrained(plain, tmp_path / "adapter").eval())
    assert torch.allclose(whole, with_peft, atol=1e-4)
    assert (whole - before).abs().max() > 0.01
    AutoTokenizer.from_pretrained(tmp_path / "whole")
    assert json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["task_type"] == "CAUSAL_LM"


async def test_a_merged_classifier_loads_without_peft(tmp_path: Path, tiny: Path) -> None:
    async with World(tmp_path, tiny, devices=2) as world:
        name = await world.run(job(rounds=2))
        write(world.coordinator.config, name, tmp_path / "whole", kind="merged")
        write(world.coordinator.config, name, tmp_path / "adapter")
    texts = [r["text"] for r in rows(20, 7)]
    said = []
    pytest.importorskip("peft")
    for folder, args in (("whole", ()), ("adapter", (tiny,))):
        sys.path.insert(0, str(tmp_path / folder))
        try:
            import load as written  # type: ignore[import-not-found]

            said.append(written.load(*args)(texts))
        finally:
            sys.path.remove(str(tmp_path / folder))
            sys.modules.pop("load", None)
    assert said[0] == said[1]


async def test_bf16_checkpoints_are_merged_in_bf16(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    full = small.tiny_llama(tmp_path / "full")
    half = tmp_path / "half"
    shutil.copytree(full, half)
    AutoModelForCausalLM.from_pretrained(full, dtype=torch.bfloat16).save_pretrained(half)
    config, name = await tuned(tmp_path / "w", half)
    write(config, name, tmp_path / "whole", kind="merged")
    write(config, name, tmp_path / "adapter")
    whole = AutoModelForCausalLM.from_pretrained(tmp_path / "whole", dtype="auto").eval()
    assert whole.dtype == torch.bfloat16
    peft = pytest.importorskip("peft")
    base = AutoModelForCausalLM.from_pretrained(half, dtype=torch.float32)
    expected = logits(peft.PeftModel.from_pretrained(base, tmp_path / "adapter").eval())
    assert torch.allclose(logits(whole.float()), expected, atol=0.05)


def test_the_program_offers_every_format() -> None:
    parser = build()._subparsers._group_actions[0].choices["export"]  # type: ignore[union-attr,index,call-overload]
    (offered,) = (a.choices for a in parser._actions if a.dest == "format")
    assert sorted(offered) == sorted(FORMATS)


def test_bf16_rounds_to_nearest_even() -> None:
    values = np.concatenate(
        [
            np.random.default_rng(0).standard_normal(1000).astype(np.float32),
            np.float32([0, 1, -1, 1.00390625, 1.01171875]),
        ]
    )
    assert np.array_equal(to_bf16(values), torch.from_numpy(values).bfloat16().view(torch.uint16).numpy())


async def test_gguf_keeps_to_the_rules_of_llama_cpp(tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    model = small.tiny_llama(tmp_path / "model")
    config, name = await tuned(tmp_path / "w", model)
    write(config, name, tmp_path / "out", kind="gguf")
    write(config, name, tmp_path / "adapter")
    reader = gguf.GGUFReader(tmp_path / "out" / "adapter.gguf")
    fields = {k: f.contents() for k, f in reader.fields.items()}
    assert (fields["general.type"], fields["adapter.type"], fields["general.architecture"]) == (
        "adapter",
        "lora",
        "llama",
    )
    tensors = {t.name: t for t in reader.tensors}
    base = {
        "attn_q": (16, 16),
        "attn_k": (16, 8),
        "attn_v": (16, 8),
        "attn_output": (16, 16),
        "ffn_up": (16, 40),
        "ffn_down": (40, 16),
    }
    from safetensors.numpy import load_file

    saved = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    peft = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    seen = 0
    for key, a in tensors.items():
        if not key.endswith(".lora_a"):
            continue
        b = tensors[key.replace(".lora_a", ".lora_b")]
        kind = key.split(".")[2]
        # ne[0] is the fastest axis: a is (in, r), b is (r, out), as `llama_adapter_lora_init` checks them.
        assert a.shape[1] == b.shape[0]
        if kind in base:
            assert (a.shape[0], b.shape[1]) == base[kind]
        hf = {"attn_v": "self_attn.v_proj", "ffn_up": "mlp.up_proj", "attn_k": "self_attn.k_proj"}.get(kind)
        if hf is None:
            continue
        module = f"model.layers.{key.split('.')[1]}.{hf}"
        theirs_a, theirs_b = (saved[f"base_model.model.{module}.lora_{s}.weight"] for s in "AB")
        rank = int(a.shape[1])
        ours = fields["adapter.lora.alpha"] / rank * (b.data.reshape(-1, rank) @ a.data.reshape(rank, -1))
        scale = peft["alpha_pattern"].get(module, peft["lora_alpha"]) / peft["rank_pattern"].get(
            module, peft["r"]
        )
        expected = scale * (theirs_b @ theirs_a)
        if kind == "attn_k":
            expected = interleaved(expected, 2)
        assert np.allclose(ours, expected, atol=1e-5)
        seen += 1
    assert seen >= 3


def test_interleaving_is_that_of_the_rotary_halves() -> None:
    rows_ = np.arange(8.0)[:, None]
    assert interleaved(rows_, 2)[:, 0].tolist() == [0, 2, 1, 3, 4, 6, 5, 7]
