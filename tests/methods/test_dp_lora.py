"""DP-LoRA: an explicit loop over examples, the size of the noise, and what it costs."""

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from rankfleet.edge_agent.worker.batches import split
from rankfleet.federated.methods.privacy.dp_lora import DpLora


def quadratic(count: int = 5) -> tuple[Any, torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    x, y, w = (torch.randn(s, generator=generator) for s in ((count, 3), (count,), (3,)))

    def gradient(params: Any, batch: Any) -> Any:
        at = params["w"].detach().requires_grad_()
        loss = ((batch["x"] @ at - batch["labels"]) ** 2).mean()
        return float(loss.detach()), {"w": torch.autograd.grad(loss, at)[0]}

    ctx = SimpleNamespace(
        split=split, gradient=gradient, state={}, generator=torch.Generator().manual_seed(1), up={}
    )
    return ctx, x, y, w


def test_equals_an_explicit_loop() -> None:
    ctx, x, y, w = quadratic()
    value, got = DpLora(noise=0.0, bound=0.5).gradient({"w": w}, {"x": x, "labels": y}, ctx)
    single = [2 * (x[i] @ w - y[i]) * x[i] for i in range(5)]
    assert any(g.norm() > 0.5 for g in single)
    wanted = sum(g * min(1.0, 0.5 / float(g.norm())) for g in single) / 5
    assert torch.allclose(got["w"], wanted, atol=1e-6)
    assert value == pytest.approx(float(((x @ w - y) ** 2).mean()), rel=1e-5)


def test_noise_is_as_large_as_it_says() -> None:
    ctx, x, y, w = quadratic()
    exact = DpLora(noise=0.0, bound=0.5).gradient({"w": w}, {"x": x, "labels": y}, ctx)[1]["w"]
    m = DpLora(noise=2.0, bound=0.5)
    off = torch.stack([m.gradient({"w": w}, {"x": x, "labels": y}, ctx)[1]["w"] - exact for _ in range(400)])
    assert float(off.std()) == pytest.approx(2.0 * 0.5 / 5, rel=0.1)


def test_epsilon_adds_up() -> None:
    # min over a of T·a/(2z²) + ln(1/δ)/(a - 1) is T/(2z²) + √(2T·ln(1/δ))/z
    m = DpLora(noise=4.0, delta=1e-5)
    for steps in (1, 10, 100):
        assert m.epsilon(steps) == pytest.approx(
            steps / 32 + math.sqrt(2 * steps * math.log(1e5)) / 4, rel=1e-3
        )
    assert m.epsilon(0) == 0.0
    assert DpLora(noise=0.0).epsilon(1) == 1e9
    ctx, *_ = quadratic()
    ctx.state["steps"] = 10
    delta: dict[str, Any] = {}
    assert m.send(delta, ctx) is delta
    assert float(ctx.up["epsilon"][0]) == pytest.approx(m.epsilon(10))
