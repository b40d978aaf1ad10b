"""APFL by hand."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from rankfleet.federated.methods.personalization.apfl import Apfl


def test_one_step_by_hand() -> None:
    # f(x) = ½(x - 2)²: w = 0, v = 3, α = ½, η = 0.1. v̄ = 1.5, ∇f(v̄) = -0.5, α ← 0.5 + 0.1·3·0.5 = 0.65
    # w ← 0 + 0.1·2 = 0.2; v ← 3 + 0.1·0.65·0.5 = 3.0325
    ctx: Any = SimpleNamespace(
        state={"own": {"w": np.array([3.0], np.float32)}}, lr=0.1, batches=lambda: iter([{}]),
        gradient=lambda params, batch: (0.0, {"w": params["w"] - 2.0}),
    )  # fmt: skip
    assert Apfl().train({"w": torch.zeros(1)}, ctx)["w"].tolist() == pytest.approx([0.2])
    assert ctx.state["alpha"] == pytest.approx(0.65)
    assert ctx.state["own"]["w"].tolist() == pytest.approx([3.0325])
    # served: 0.65·3.0325 + 0.35·0.2
    assert Apfl().serve({"w": np.array([0.2])}, ctx)["w"].tolist() == pytest.approx([2.041125])


def test_alpha_finds_the_mixture_of_two_quadratics() -> None:
    # The device's optimum is 2, w is pinned at 0 and v at 3: α → 2/3.
    state: dict[str, Any] = {"alpha": 0.1}
    calls = []

    def gradient(params: Any, batch: Any) -> Any:
        calls.append(1)
        return 0.0, {"w": torch.zeros(1) if len(calls) % 2 else params["w"] - 2.0}

    ctx: Any = SimpleNamespace(state=state, lr=0.05, batches=lambda: iter([{}]), gradient=gradient)
    for _ in range(400):
        state["own"] = {"w": np.array([3.0], np.float32)}
        Apfl().train({"w": torch.zeros(1)}, ctx)
    assert state["alpha"] == pytest.approx(2 / 3, abs=1e-3)


def test_without_anything_of_its_own_it_serves_what_arrived() -> None:
    ctx: Any = SimpleNamespace(state={})
    assert Apfl().serve({"w": np.ones(2)}, ctx)["w"].tolist() == [1.0, 1.0]
