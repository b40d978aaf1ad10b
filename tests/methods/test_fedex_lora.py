"""FedEx-LoRA: means and carry together are the mean of products."""

import numpy as np
import pytest

from rankfleet.federated.contract.catalogue import build
from rankfleet.federated.contract.contexts import Adapter
from rankfleet.federated.contract.spec import Pair, Spec
from rankfleet.federated.contract.update import LowRank, Update

from .test_by_hand import RNG, server


@pytest.mark.parametrize("halved", [False, True])
def test_the_carry_makes_it_exact(halved: bool) -> None:
    spec = Spec({"m": Pair(0, 6, 5, 2, 1.0, 6, 5, "v")}, {})
    a0, b0 = RNG(0).standard_normal((2, 5)), RNG(1).standard_normal((6, 2))
    updates = [
        Update(
            d,
            w,
            {"m.A": RNG(i).standard_normal((2, 5)), "m.B": RNG(9 + i).standard_normal((6, 2))},
            spec,
            {"m.A": a0, "m.B": b0},
        )
        for i, (d, w) in enumerate((("a", 1.0), ("b", 1.0), ("c", 2.0)), 2)
    ]
    if halved:
        updates[0] = updates[0].scale(0.5)  # what a defence before it did counts too
    shares = [0.25, 0.25, 0.5]
    change = {
        f"m.{s}": sum(p * u.delta[f"m.{s}"] for p, u in zip(shares, updates, strict=True)) for s in "AB"
    }
    ctx = server()
    ctx.adapter, ctx.updates = Adapter({"m": LowRank(b0, a0)}, {}), updates
    assert build("fedex_lora").step(change, ctx) is change
    goal = sum(
        p * (b0 + u.delta["m.B"]) @ (a0 + u.delta["m.A"]) for p, u in zip(shares, updates, strict=True)
    )
    carry = ctx.carry["m"]
    assert np.allclose(carry.B @ carry.A + (b0 + change["m.B"]) @ (a0 + change["m.A"]), goal)
