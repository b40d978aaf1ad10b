"""What can be wrong with a model's files: one error that says what, or made again where that is possible."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from rankfleet.edge_agent.model import Base
from rankfleet.edge_agent.model.stored.prepared import LIST, Shelf
from rankfleet.federated.errors import Refused
from rankfleet.profiles.card import read_card

from .families import make
from .test_families import batch


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    folder = make("llama", tmp_path / "m")
    names = dict.fromkeys(load_file(folder / "model.safetensors"), "model-00001-of-00002.safetensors")
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    names["lm_head.weight"] = "model-00002-of-00002.safetensors"
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    with pytest.raises(Refused, match=r"lacks 1 of 2 shards: model-00002-of-00002"):
        Base(folder, [], 32, {}, True)


def test_a_missing_tensor_is_named(tmp_path: Path) -> None:
    folder = make("bert", tmp_path / "m")
    tensors = load_file(folder / "model.safetensors")
    save_file(
        {k: t for k, t in tensors.items() if "layer.2.output.dense.weight" not in k},
        folder / "model.safetensors",
    )
    with pytest.raises(Refused, match=r"no tensor `encoder\.layer\.2\.output\.dense\.weight`"):
        Base(folder, [], 32, {})


def test_a_torn_file_is_named(tmp_path: Path) -> None:
    folder = make("bert", tmp_path / "m")
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[: len(data) // 2])
    with pytest.raises(Refused, match="cannot be read"):
        Base(folder, [], 32, {})


def test_pickles_and_nothing_are_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(Refused, match="pickled weights are never loaded"):
        Base(tmp_path, [], 32, {})


def test_a_model_without_blocks_has_no_card(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "odd", "hidden_size": 8}))
    save_file({"table": torch.zeros(4, 8)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="no layers found in 1 tensors of a `odd` model"):
        read_card(tmp_path)


def test_a_text_that_is_too_long_is_refused(tmp_path: Path) -> None:
    base = Base(make("roberta", tmp_path / "m"), [], 32, {})
    ids = torch.full((1, 50), 5)
    with pytest.raises(Refused, match="a text has 50 tokens, the model takes 38"):
        base.hidden({"input_ids": ids, "attention_mask": torch.ones_like(ids)})


@pytest.mark.parametrize("what", ["a bit", "a file", "the list", "cut off"])
def test_a_damaged_prepared_base_is_made_again(tmp_path: Path, what: str) -> None:
    folder, shelf = make("bert", tmp_path / "m"), Shelf(tmp_path / "s", 100)
    expected = Base(folder, [], 4, {}, shelf=shelf, digest="d").hidden(batch())[0]
    (kept,) = (tmp_path / "s").iterdir()
    file = kept / "layer-001.safetensors"
    data = bytearray(file.read_bytes())
    if what == "a bit":
        data[-5] ^= 1
        file.write_bytes(bytes(data))
    elif what == "a file":
        file.unlink()
    elif what == "the list":
        (kept / LIST).write_text("[")
    else:
        file.write_bytes(bytes(data[:-7]))
    written = shelf.written
    again = Base(folder, [], 4, {}, shelf=shelf, digest="d").hidden(batch())[0]
    assert torch.equal(again, expected)
    assert shelf.written == 2 * written


def test_the_shelf_keeps_to_its_quota_and_forgets_the_oldest(tmp_path: Path) -> None:
    folder = make("bert", tmp_path / "m")
    shelf = Shelf(tmp_path / "s", 0.15)
    for bits in (16, 8, 4):
        Base(folder, [], bits, {}, shelf=shelf, digest="d")
    assert len(list((tmp_path / "s").iterdir())) < 3
    Base(folder, [], 4, {}, shelf=shelf, digest="d")


@pytest.mark.parametrize(("quota", "writes"), [(0.01, 100.0), (100.0, 0.01)])
def test_what_has_no_room_is_not_begun(tmp_path: Path, quota: float, writes: float) -> None:
    shelf = Shelf(tmp_path / "s", quota, writes)
    with pytest.raises(OSError, match=r"it would take 0 MB, 0 may be written"):
        Base(make("bert", tmp_path / "m"), [], 8, {}, shelf=shelf, digest="d")
    assert not (tmp_path / "s").exists()
    assert shelf.written == 0
