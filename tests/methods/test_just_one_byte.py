"""Just one byte: the code, one step by hand, and that a step goes down."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from rankfleet.federated.contract.spec import Dense, Spec
from rankfleet.federated.contract.update import Update
from rankfleet.federated.methods.optimizers.just_one_byte import JustOneByte, code, directions, slope

SPEC = Spec({}, {"w": Dense((4,))})


@pytest.mark.parametrize("g", [1.0, -1.0, 0.03, -5e-4, 54.0, -1e6, 1e-9, 0.0])
def test_a_code_is_a_byte_and_keeps_the_slope(g: float) -> None:
    byte = code(g)
    assert -127 <= byte <= 127
    cut = float(np.clip(abs(g), 0, np.exp(4))) if abs(g) > np.exp(-10) else 0.0
    assert slope(byte) == pytest.approx(np.sign(g) * cut, rel=0.06)


def test_looks_on_both_sides_and_walks_down() -> None:
    target = torch.tensor([1.0, -2.0, 0.5, 3.0])
    graphs = []

    def task_loss(params: Any, batch: Any) -> Any:
        graphs.append(params["w"].requires_grad or torch.is_grad_enabled())
        return 0.5 * (params["w"] - target).square().sum()

    m, w = JustOneByte(lr=0.3), torch.zeros(4)
    for number in range(150):
        round = SimpleNamespace(number=number)
        ctx: Any = SimpleNamespace(
            round=round, device="d0", up={}, task_loss=task_loss, batches=lambda: iter([{}] * 3)
        )
        assert m.train({"w": w}, ctx) == {}
        z = directions({"w": w}, number, "d0", 0)["w"]
        assert slope(int(ctx.up["codes"][0])) == pytest.approx(
            float(((w - target) * torch.tensor(z)).sum()), rel=0.07, abs=1e-3
        )
        update = Update("d0", 1.0, {}, SPEC, {}, extra={"just_one_byte": ctx.up})
        moved = m.reduce([update], ctx)["w"]
        wanted = (
            -0.3
            / 3
            * sum(
                slope(int(c)) * directions({"w": w}, number, "d0", n)["w"]
                for n, c in enumerate(ctx.up["codes"])
            )
        )
        assert np.allclose(moved, wanted, atol=1e-5)
        w = w + torch.from_numpy(moved)
    assert not any(graphs)
    assert float((w - target).norm()) < 0.1
