"""A whole model as GGUF: numbers, tensors and tokenizer as llama.cpp reads them; and llama.cpp itself,
where it is installed."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from rankfleet.coordinator.export.folder import write_folder
from rankfleet.coordinator.export.gguf_lora import interleaved
from rankfleet.coordinator.export.gguf_model import FAMILIES as WRITTEN
from rankfleet.coordinator.export.gguf_model import turned, write_model
from rankfleet.coordinator.export.weights import Weights
from rankfleet.coordinator.store.versions import Version
from rankfleet.federated.contract.update import LowRank
from rankfleet.federated.errors import ConfigError
from rankfleet.profiles.card import read_card

from .edge_agent.families import FAMILIES

gguf = pytest.importorskip("gguf")
WORDS = ["<unk>", "<s>", "</s>", "<0x0A>", "▁", "a", "b", "ab", "▁ab"]
SENTENCE = {
    "added_tokens": [{"id": n, "content": WORDS[n], "special": True} for n in range(3)],
    "normalizer": {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "▁"}]},
    "pre_tokenizer": None,
    "model": {"type": "BPE", "byte_fallback": True, "unk_token": "<unk>", "vocab": {w: n for n,
    w in enumerate(WORDS)},
              "merges": ["a b", "▁ ab"]},
}  # fmt: skip
BYTES = {
    "added_tokens": [{"id": 2, "content": "<|end|>", "special": True}], "normalizer": None,
    "pre_tokenizer": {"type": "Sequence", "pretokenizers": [{"type": "Digits"}, {"type": "ByteLevel"}]},
    "model": {"type": "BPE", "byte_fallback": False, "vocab": {"a": 0, "b": 1, "ab": 3}, "merges": [["a",
    "b"]]},
}  # fmt: skip


def made(
    folder: Path, family: str, dtype: torch.dtype = torch.float32, tokenizer: Any = SENTENCE
) -> tuple[Path, Version]:
    """A base that llama.cpp could hold, and a version over it."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(7)
    config = {**FAMILIES[family], "max_position_embeddings": 64, "hidden_size": 64, "intermediate_size": 96}
    if family == "mistral":
        config["sliding_window"] = None
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **config))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.1)
    model.to(dtype).save_pretrained(folder)
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"bos_token": "<s>", "eos_token": {"content": "</s>"}, "add_bos_token": True})
    )
    rng = np.random.default_rng(0)
    pairs = {
        m.name: LowRank(rng.standard_normal((m.out, 2)) * 0.1, rng.standard_normal((2, m.in_)) * 0.1)
        for m in read_card(folder).modules
    }
    return folder, Version(1, pairs, {}, {}, {})


@pytest.mark.parametrize("ratio", [0.0, 0.5])
@pytest.mark.parametrize("family", WRITTEN)
def test_tensors_and_numbers(tmp_path: Path, family: str, ratio: float) -> None:
    from safetensors.numpy import load_file

    folder, version = made(tmp_path / "base", family)
    reader = gguf.GGUFReader(write_model(Weights(version, folder, ratio, 0.7), tmp_path / "out", "x"))
    write_folder(version, folder, tmp_path / "hf", ratio, 0.7)
    plain, config = (
        load_file(tmp_path / "hf" / "model.safetensors"),
        json.loads((tmp_path / "hf" / "config.json").read_text()),
    )
    fields = {k: f.contents() for k, f in reader.fields.items()}
    arch = fields["general.architecture"]
    assert arch == ("llama" if family in ("llama", "mistral") or (family == "qwen2" and ratio) else family)
    assert fields[f"{arch}.feed_forward_length"] == config["intermediate_size"]
    assert fields[f"{arch}.attention.head_count"] == config["num_attention_heads"]
    assert fields[f"{arch}.attention.head_count_kv"] == config["num_key_value_heads"]
    tensors = {t.name: t.data for t in reader.tensors}
    q, norm = plain["model.layers.1.self_attn.q_proj.weight"], plain["model.layers.0.input_layernorm.weight"]
    expected = interleaved(q, config["num_attention_heads"]) if arch == "llama" else q
    assert np.array_equal(tensors["blk.1.attn_q.weight"], expected)
    assert np.array_equal(tensors["blk.2.ffn_down.weight"], plain["model.layers.2.mlp.down_proj.weight"])
    assert np.array_equal(tensors["blk.0.attn_norm.weight"], norm + np.float32(family == "gemma"))
    if family == "qwen2":
        bias = plain["model.layers.1.self_attn.k_proj.bias"]
        assert np.array_equal(
            tensors["blk.1.attn_k.bias"], turned(bias, config["num_key_value_heads"]) if ratio else bias
        )


def test_bf16_stays_bf16(tmp_path: Path) -> None:
    folder, version = made(tmp_path / "base", "llama", torch.bfloat16)
    tensors = {
        t.name: t
        for t in gguf.GGUFReader(
            write_model(Weights(version, folder, 0.5, 0.7), tmp_path / "out", "x")
        ).tensors
    }
    assert tensors["blk.0.ffn_up.weight"].tensor_type == gguf.GGMLQuantizationType.BF16
    assert tensors["blk.0.ffn_up.weight"].shape.tolist() == [64, 48]
    assert tensors["output_norm.weight"].tensor_type == gguf.GGMLQuantizationType.F32


def test_sentencepiece_becomes_scores_in_the_order_of_merges(tmp_path: Path) -> None:
    folder, version = made(tmp_path / "base", "llama")
    reader = gguf.GGUFReader(write_model(Weights(version, folder, 0.0, 0.7), tmp_path / "out", "x"))
    fields = {k: f.contents() for k, f in reader.fields.items() if k.startswith("tokenizer")}
    scores = dict(zip(fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.scores"], strict=True))
    kinds = dict(zip(fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"], strict=True))
    assert scores["ab"] == 0
    assert scores["▁ab"] == -1
    assert scores["a"] < scores["▁ab"]
    assert [kinds[w] for w in ("<unk>", "<s>", "<0x0A>", "ab", "[PAD20]")] == [2, 3, 6, 1, 3]
    assert fields["tokenizer.ggml.model"] == "llama"
    assert fields["tokenizer.ggml.add_space_prefix"]
    assert (fields["tokenizer.ggml.bos_token_id"], fields["tokenizer.ggml.eos_token_id"]) == (1, 2)
    assert len(scores) == 61


@pytest.mark.parametrize(("family", "expected"), [("llama", "smollm"), ("qwen2", "qwen2")])
def test_byte_level_keeps_its_merges(tmp_path: Path, family: str, expected: str) -> None:
    folder, version = made(tmp_path / "base", family, tokenizer=BYTES)
    reader = gguf.GGUFReader(write_model(Weights(version, folder, 0.0, 0.7), tmp_path / "out", "x"))
    fields = {k: f.contents() for k, f in reader.fields.items() if k.startswith("tokenizer")}
    assert (fields["tokenizer.ggml.model"], fields["tokenizer.ggml.pre"]) == ("gpt2", expected)
    assert fields["tokenizer.ggml.merges"] == ["a b"]
    assert fields["tokenizer.ggml.tokens"][:4] == ["a", "b", "<|end|>", "ab"]


def test_what_cannot_be_written_is_said(tmp_path: Path) -> None:
    folder, version = made(
        tmp_path / "base", "llama", tokenizer={**SENTENCE, "model": {"type": "Unigram", "vocab": []}}
    )
    with pytest.raises(ConfigError, match="Unigram"):
        write_model(Weights(version, folder, 0.0, 0.7), tmp_path / "out", "x")
    (folder / "tokenizer.json").unlink()
    with pytest.raises(ConfigError, match=r"no tokenizer\.json"):
        write_model(Weights(version, folder, 0.0, 0.7), tmp_path / "out", "x")
    from .edge_agent.families import make

    opt = make("opt", tmp_path / "opt")
    with pytest.raises(ConfigError, match="convert_hf_to_gguf"):
        write_model(Weights(Version(0, {}, {}, {}, {}), opt, 0.0, 1.0), tmp_path / "out", "x")
    windowed = make("mistral", tmp_path / "mistral")
    with pytest.raises(ConfigError, match="window of 5"):
        write_model(Weights(Version(0, {}, {}, {}, {}), windowed, 0.0, 1.0), tmp_path / "out", "x")


@pytest.mark.parametrize("ratio", [0.0, 0.5])
@pytest.mark.parametrize("name", ["stories260k", "babyllama361", "tinystories656k"])
def test_llama_cpp_says_what_transformers_says(tmp_path: Path, shared: Path, name: str, ratio: float) -> None:
    llama_cpp = pytest.importorskip(
        "llama_cpp", reason="llama-cpp-python is not installed (pip builds it in ten minutes)"
    )
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = shared / "models" / name
    rng = np.random.default_rng(0)
    pairs = {
        m.name: LowRank(rng.standard_normal((m.out, 2)) * 0.05, rng.standard_normal((2, m.in_)) * 0.05)
        for m in read_card(folder).modules
    }
    version = Version(1, pairs, {}, {}, {})
    file = write_model(Weights(version, folder, ratio, 0.7), tmp_path / "out", name)
    write_folder(version, folder, tmp_path / "hf", ratio, 0.7)
    text = "Once upon a time, there was a dog named Tim. He loved 7 cats!"
    ids = AutoTokenizer.from_pretrained(tmp_path / "hf")(text)["input_ids"]
    theirs = llama_cpp.Llama(str(file), logits_all=True, verbose=False, n_ctx=128)
    assert theirs.tokenize(text.encode()) == ids
    theirs.eval(ids)
    with torch.no_grad():
        expected = (
            AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
            .eval()(torch.tensor([ids]))
            .logits[0]
            .numpy()
        )
    assert np.abs(np.array(theirs.scores[: len(ids)]) - expected).max() < 2e-3 * np.abs(expected).max()
