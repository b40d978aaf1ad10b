"""A pruned model as files: plain transformers loads it, and it computes what a device at that ratio
computes."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from rankfleet.coordinator.export.folder import OWN_HEAD_SIZE, write_folder
from rankfleet.coordinator.planning import importance as channels
from rankfleet.coordinator.store.versions import Version
from rankfleet.edge_agent.model import Base
from rankfleet.federated.contract.update import LowRank
from rankfleet.federated.errors import ConfigError
from rankfleet.profiles.card import read_card

from .edge_agent.families import ENCODERS, FAMILIES, make
from .edge_agent.test_families import batch, theirs


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", OWN_HEAD_SIZE)
def test_the_files_are_the_devices_model(tmp_path: Path, family: str, dtype: torch.dtype) -> None:
    from transformers import AutoModelForCausalLM

    folder = make(family, tmp_path / "base")
    if dtype is torch.bfloat16:
        AutoModelForCausalLM.from_pretrained(folder).to(dtype).save_pretrained(folder)
    card = read_card(folder)
    rng = np.random.default_rng(0)
    pairs = {
        m.name: LowRank(rng.standard_normal((m.out, 2)) * 0.2, rng.standard_normal((2, m.in_)) * 0.2)
        for m in card.modules
    }
    size = write_folder(Version(3, pairs, {}, {}, {}), folder, tmp_path / "small", 0.5, 0.7)
    assert size["after_mb"] < 0.8 * size["before_mb"]
    masks = channels.masks(card, channels.importance(folder, card), 0.5)
    base = Base(folder, [], 32, masks, True)
    for name, site in base.sites.items():
        out, in_ = masks.get(f"{name}.out", slice(None)), masks.get(f"{name}.in", slice(None))
        site.place(
            torch.from_numpy(pairs[name].A[:, in_]).float(),
            torch.from_numpy(pairs[name].B[out]).float(),
            0.7,
            False,
        )
    given = batch()
    with torch.no_grad():
        ours, layout = base.hidden(given)
        plain = theirs(tmp_path / "small", True).float().base_model
        expected = plain(
            input_ids=given["input_ids"], attention_mask=given["attention_mask"]
        ).last_hidden_state[given["attention_mask"].bool()]
    tolerance = 1e-5 if dtype is torch.float32 else 0.05
    assert (ours[: layout.real] - expected).norm() < tolerance * expected.norm()
    config = json.loads((tmp_path / "small/config.json").read_text())
    assert config["intermediate_size"] < card.ffn


@pytest.mark.parametrize("family", sorted(set(FAMILIES) - set(OWN_HEAD_SIZE)))
def test_heads_that_no_configuration_can_express_are_refused(tmp_path: Path, family: str) -> None:
    folder = make(family, tmp_path / "base")
    with pytest.raises(ConfigError, match="no configuration"):
        write_folder(Version(0, {}, {}, {}, {}), folder, tmp_path / "small", 0.5, 1.0)
    assert not (tmp_path / "small").exists()


def test_a_ratio_outside_is_refused(tmp_path: Path) -> None:
    assert "bert" in ENCODERS
    with pytest.raises(ConfigError, match="between 0 and 1"):
        write_folder(
            Version(0, {}, {}, {}, {}), make("llama", tmp_path / "base"), tmp_path / "small", 1.5, 1.0
        )
