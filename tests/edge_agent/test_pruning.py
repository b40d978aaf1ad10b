"""Pruned heads and channels, in every family: the physically small model is the masked large one; masks
nest, and groups stay whole."""

from pathlib import Path

import numpy as np
import pytest
import torch

from rankfleet.coordinator.planning import importance as channels
from rankfleet.edge_agent.model import Base
from rankfleet.profiles.card import ModelCard, read_card
from rankfleet.profiles.memory import kept, kept_groups, shape

from .families import ENCODERS, FAMILIES, make
from .test_families import adapted, batch

RATIOS = (0.25, 0.5)


@pytest.fixture(scope="module", params=FAMILIES)
def model(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, bool, ModelCard]:
    folder = make(request.param, tmp_path_factory.mktemp("models") / request.param)
    return folder, request.param not in ENCODERS, read_card(folder)


@pytest.mark.parametrize("ratio", RATIOS)
def test_the_small_model_is_the_masked_large_one(model: tuple[Path, bool, ModelCard], ratio: float) -> None:
    """Rows that were cut are zeros in the large one, in weight, bias and factors alike; so are the columns
    behind them."""
    folder, causal, card = model
    masks = channels.masks(card, channels.importance(folder, card), ratio)
    small, large = Base(folder, [], 32, masks, causal), Base(folder, [], 32, {}, causal)
    adapted(large)
    for name, site in large.sites.items():
        out, in_ = masks.get(f"{name}.out"), masks.get(f"{name}.in")
        weight = site.base.tensors["weight"].clone()
        a, b = site.A.detach().clone(), site.B.detach().clone()
        if out is not None:
            gone = np.setdiff1d(np.arange(weight.shape[0]), out)
            weight[gone], b[gone] = 0, 0
            if site.base.bias is not None:
                site.base.bias = site.base.bias.clone()
                site.base.bias[gone] = 0
        if in_ is not None:
            gone = np.setdiff1d(np.arange(weight.shape[1]), in_)
            weight[:, gone], a[:, gone] = 0, 0
        site.base.tensors = {"weight": weight}
        site.place(a, b, site.scale, True)
        rows = slice(None) if out is None else torch.from_numpy(out.astype(np.int64))
        columns = slice(None) if in_ is None else torch.from_numpy(in_.astype(np.int64))
        small.sites[name].place(a[:, columns], b[rows], site.scale, True)
    with torch.no_grad():
        ours, expected = small.hidden(batch())[0], large.hidden(batch())[0]
    assert torch.allclose(ours, expected, atol=1e-5 * expected.abs().max().item())
    for name, site in small.sites.items():
        module = next(m for m in card.modules if m.name == name)
        assert (site.base.out, site.base.in_) == shape(card, module, ratio)


def test_every_family_has_heads_and_channels_to_prune(model: tuple[Path, bool, ModelCard]) -> None:
    folder, _, card = model
    scores = channels.importance(folder, card)
    assert set(scores.channels) == set(scores.heads) == set(range(card.layers))
    found = [channels.masks(card, scores, r) for r in (0.2, 0.5, 0.75)]
    for name, index in found[1].items():
        assert set(found[2][name]) <= set(index)
        assert set(index) <= set(found[0].get(name, index))
    for layer in range(card.layers):
        roles = {m.role: m.name for m in card.of_layer(layer) if m.role not in ("up", "down")}
        if card.groups > 1:
            side = f"{roles.get('v') or roles['qkv']}.out"
            assert len(found[1][side]) == kept_groups(card.groups, 0.5) * card.head_size * (
                3 if "qkv" in roles else 1
            )
    ups, downs = card.channels(0)
    assert all(len(found[1][f"{m.name}.out"]) == kept(card.ffn, 0.5) for m in ups)
    assert np.array_equal(found[1][f"{ups[0].name}.out"], found[1][f"{downs[0].name}.in"])


def test_a_ratio_near_one_leaves_a_head_and_a_channel(model: tuple[Path, bool, ModelCard]) -> None:
    folder, causal, card = model
    masks = channels.masks(card, channels.importance(folder, card), 0.999)
    base = Base(folder, [], 32, masks, causal)
    with torch.no_grad():
        assert base.hidden(batch())[0].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_importance_reads_checkpoints_of_every_width(tmp_path: Path, dtype: torch.dtype) -> None:
    from transformers import AutoModel

    folder = make("bert", tmp_path / "a")
    AutoModel.from_pretrained(folder).to(dtype).save_pretrained(tmp_path / "b")
    wide, narrow = (channels.importance(p, read_card(p)) for p in (folder, tmp_path / "b"))
    assert np.allclose(wide.channels[0], narrow.channels[0], rtol=0.02)
    assert np.allclose(wide.heads[2], narrow.heads[2], rtol=0.02)
    whole = [Base(p, [], 32, {}).hidden(batch())[0] for p in (folder, tmp_path / "b")]
    assert torch.allclose(*whole, atol=0.1)
