"""Images on the engine's own pass: as transformers computes them, pruned as masked, trained by its
gradients."""

from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch

from rankfleet.coordinator.planning import importance as channels
from rankfleet.edge_agent.model import Base
from rankfleet.profiles.card import read_card
from rankfleet.profiles.memory import shape, step_plan

from ..world import tiny_vit

PIXELS = torch.rand(3, 1, 8, 8, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights large enough that every part matters."""
    from transformers import ViTModel

    made = tiny_vit(tmp_path_factory.mktemp("vit"))
    model = ViTModel.from_pretrained(made, add_pooling_layer=False)
    torch.manual_seed(3)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.2)
    model.save_pretrained(made)
    return made


def adapted(base: Base) -> None:
    rng = np.random.default_rng(0)
    for site in base.sites.values():
        a, b = (
            torch.from_numpy(rng.standard_normal(s)).float() * 0.2
            for s in ((2, site.base.in_), (site.base.out, 2))
        )
        site.place(a, b, 0.5, True)


def test_hidden_states_and_gradients_are_those_of_transformers(folder: Path) -> None:
    from transformers import ViTModel

    base = Base(folder, [], 32, {})
    assert base.core is not None
    theirs = ViTModel.from_pretrained(folder, add_pooling_layer=False).eval()
    rows, layout = base.hidden({"pixel_values": PIXELS})
    expected = theirs(pixel_values=PIXELS).last_hidden_state
    assert torch.allclose(layout.spread(rows), expected, atol=1e-5 * expected.abs().max().item())
    adapted(base)
    site = base.sites["encoder.layer.0.output.dense"]
    with torch.no_grad():
        merged = {
            id(p): s
            for p in theirs.parameters()
            for s in base.sites.values()
            if torch.equal(s.base.tensors["weight"], p)
        }
        for p in theirs.parameters():
            if (found := merged.get(id(p))) is not None:
                p.add_(0.5 * found.B @ found.A)
    theirs(pixel_values=PIXELS).last_hidden_state.square().sum().backward()
    (weight,) = (p for p in theirs.parameters() if merged.get(id(p)) is site)
    (ours,) = torch.autograd.grad(base.hidden({"pixel_values": PIXELS})[0].square().sum(), [site.A])
    expected = 0.5 * site.B.detach().t() @ weight.grad
    assert torch.allclose(ours, expected, rtol=1e-3, atol=1e-4 * expected.abs().max().item())


@pytest.mark.parametrize("ratio", [0.3, 0.5])
def test_the_small_model_is_the_masked_large_one(folder: Path, ratio: float) -> None:
    card = read_card(folder)
    assert {m.role for m in card.of_layer(0)} == {"q", "k", "v", "o", "up", "down"}
    masks = channels.masks(card, channels.importance(folder, card), ratio)
    assert len(masks["encoder.layer.0.attention.attention.query.out"]) == 12  # one of two heads
    small, large = Base(folder, [], 32, masks), Base(folder, [], 32, {})
    adapted(large)
    for name, site in large.sites.items():
        weight, a, b = site.base.tensors["weight"].clone(), site.A.detach().clone(), site.B.detach().clone()
        out, in_ = (
            masks.get(f"{name}.{side}", np.arange(n)).astype(np.int64)
            for side, n in zip(("out", "in"), weight.shape, strict=True)
        )
        lost, unread = (
            np.setdiff1d(np.arange(weight.shape[0]), out),
            np.setdiff1d(np.arange(weight.shape[1]), in_),
        )
        weight[lost], b[lost], weight[:, unread], a[:, unread] = 0, 0, 0, 0
        site.base.bias = site.base.bias.clone()
        site.base.bias[lost] = 0
        site.base.tensors = {"weight": weight}
        site.place(a, b, site.scale, True)
        small.sites[name].place(a[:, in_], b[out], site.scale, True)
        assert (len(out), len(in_)) == shape(card, next(m for m in card.modules if m.name == name), ratio)
    with torch.no_grad():
        ours, expected = small.hidden({"pixel_values": PIXELS})[0], large.hidden({"pixel_values": PIXELS})[0]
    assert torch.allclose(ours, expected, atol=1e-5 * expected.abs().max().item())


def test_memory_is_that_of_its_patches_whatever_length_a_job_names(folder: Path) -> None:
    card = read_card(folder)
    assert card.image_tokens == 17
    where = {m.name: 4 for m in card.modules}
    plans = [step_plan(card, where, 0.0, 32, 4, length) for length in (17, 128)]
    assert plans[0] == plans[1]
    assert (
        plans[0].memory_mb
        == step_plan(msgspec.structs.replace(card, image_tokens=0), where, 0.0, 32, 4, 17).memory_mb
    )


@pytest.mark.parametrize("bits", [16, 8, 4])
def test_fewer_bits_stay_near(folder: Path, bits: int) -> None:
    with torch.no_grad():
        wide, few = (Base(folder, [], b, {}).hidden({"pixel_values": PIXELS})[0] for b in (32, bits))
    assert (wide - few).norm() < {16: 0.02, 8: 0.02, 4: 0.3}[bits] * wide.norm()
