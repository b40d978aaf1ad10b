"""SSF by hand, and as an agent answers with it."""

from types import SimpleNamespace

import numpy as np
import torch

from rankfleet.federated.contract.spec import Pair, Spec
from rankfleet.federated.methods.adapters.ssf import Ssf

SPEC = Spec({"m": Pair(0, 2, 3, 0, 1.0, 2, 3, "")}, {})


def test_scales_and_shifts_channels() -> None:
    # γ = (3, 1/2), β = (1, -1): (1, 4) → (3·1 + 1, 4/2 - 1)
    p = {"m.scale": torch.tensor([2.0, -0.5]), "m.shift": torch.tensor([1.0, -1.0])}
    y = torch.tensor([[1.0, 4.0]])
    assert Ssf().tuned("m", y, y, p, None).tolist() == [[4.0, 1.0]]
    assert Ssf(shift=False).tuned("m", y, y, p, None).tolist() == [[3.0, 2.0]]


def test_starts_as_the_base_and_needs_no_factors() -> None:
    ctx = SimpleNamespace()
    added = Ssf().tensors(SPEC, ctx)  # type: ignore[arg-type]
    assert {k: t.value.shape for k, t in added.items()} == {"m.scale": (2,), "m.shift": (2,)}
    assert not any(np.any(t.value) for t in added.values())
    assert Ssf(shift=False).tensors(SPEC, ctx).keys() == {"m.scale"}  # type: ignore[arg-type]
    assert Ssf().plan({"rank": 4}, "d", ctx) == {"rank": 0}  # type: ignore[arg-type]
