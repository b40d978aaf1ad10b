"""Prefix tuning: rows in front, by hand and in a model."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from rankfleet.edge_agent.model.ops.layout import Layout
from rankfleet.federated.methods.adapters.prefix import Prefix
from tests.edge_agent.rig import adapter, rig

CTX: Any = SimpleNamespace(rng=np.random.default_rng(0))


def test_rows_for_the_first_layer_or_for_all(tiny: Path) -> None:
    spec, _ = adapter(tiny)
    assert {k: t.value.shape for k, t in Prefix(length=3).tensors(spec, CTX).items()} == {"prefix.0": (3, 16)}
    deep = Prefix(length=3, deep=True).tensors(spec, CTX)
    assert {k: t.value.shape for k, t in deep.items()} == {"prefix.0": (3, 16), "prefix.1": (3, 16)}


def test_a_deep_prefix_renews_the_rows_of_every_text() -> None:
    # Two texts of three and two tokens, of which the first stands for the prefix.
    layout = Layout(torch.tensor([[1, 1, 1], [1, 1, 0]]))
    block = torch.arange(6.0).view(2, 3, 1)
    rows = Prefix(length=1).renewed(1, layout.rows_of(block), {"prefix.1": torch.tensor([[-7.0]])}, layout)
    assert layout.spread(rows).flatten().tolist() == [-7.0, 1.0, 2.0, -7.0, 4.0, 0.0]


def test_the_model_reads_it_and_learns_it(tiny: Path) -> None:
    for method in (Prefix(), Prefix(deep=True)):
        bare, _ = adapter(tiny)
        rows = {k: np.asarray(t.value, np.float32) for k, t in method.tensors(bare, CTX).items()}
        spec, tensors = adapter(tiny, dense=rows)
        trainer = rig(tiny, {"prefix": method}, spec=spec, tensors=tensors)
        trained = trainer.train()
        assert all(np.abs(trained[k] - t).min() > 0 for k, t in rows.items())
