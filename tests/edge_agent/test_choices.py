"""Logits of single tokens of a causal model, and rows in front of its texts."""

from pathlib import Path

import pytest
import torch
from torch.nn.functional import cross_entropy

from rankfleet.edge_agent.model import Base
from rankfleet.edge_agent.model.places import Attached
from tests.world import tiny_llama


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_choices_are_the_logits_behind_the_loss(tmp_path: Path, family: str) -> None:
    base = Base(tiny_llama(tmp_path / family, family), [], 32, {}, True)
    ids = torch.randint(4, 20, (3, 7), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, 5:] = 0
    labels = torch.where((torch.arange(7) > 3) & (mask > 0), ids, -100)
    batch = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    losses, _, _ = base.answers(batch)
    every = base.choices(batch, range(22))
    assert torch.allclose(
        cross_entropy(every, labels[:, 1:][labels[:, 1:] != -100], reduction="none"), losses, atol=1e-5
    )
    assert torch.allclose(base.choices(batch, [7, 5]), every[:, [7, 5]], atol=1e-5)
    assert base.core is not None
    base.core.places = places = Attached(base.sites)
    places.front(2, lambda p: p["rows"])
    places.p = {"rows": torch.ones(2, 16, requires_grad=True)}
    moved = base.choices(batch, range(22))
    assert moved.shape == every.shape
    assert not torch.allclose(moved, every)
    (grad,) = torch.autograd.grad(moved.square().sum(), [places.p["rows"]])
    assert torch.isfinite(grad).all()
    assert (grad != 0).any()
