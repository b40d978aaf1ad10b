"""DBW: gains and times worked by hand, and whom it waits for."""

import numpy as np
import pytest

from rankfleet.federated.contract.catalogue import build
from rankfleet.federated.contract.contexts import Arrival

from .test_by_hand import server, update


def test_it_waits_for_as_many_as_pay() -> None:
    m, ctx = build("dbw_backup_workers", {"curvature": 1.0}), server()
    seconds = {"a": 1.0, "b": 1.1, "c": 9.0}
    ctx.updates = [
        update(d, {"w": [v]}, report={"seconds": seconds[d]}) for d, v in (("a", 1.0), ("b", 2.0), ("c", 3.0))
    ]
    change = {"w": np.array([2.0], np.float32)}
    assert m.step(change, ctx) is change
    # V = (1 + 0 + 1)/2 = 1, ‖∇F‖² = 4 - 1/3; Ĝ(k) = ½(11/3 - 1/k), over T̂: 1.33, 1.44, 0.19
    assert ctx.state["spread"] == pytest.approx(1.0)
    assert ctx.state["signal"] == pytest.approx(11 / 3)
    assert ctx.state["times"].tolist() == pytest.approx([1.0, 1.1, 9.0])
    assert ctx.state["k"] == 2


def test_it_closes_at_k_but_waits_for_who_was_silent() -> None:
    m, ctx = build("dbw_backup_workers", {"silence": 3}), server({"k": 2, "heard": {"c": 1}})
    arrived = [Arrival("a", 1.0, {}), Arrival("b", 1.1, {})]
    assert m.ready(arrived, ["c"], 2.0, ctx)
    assert not m.ready(arrived[:1], ["b", "c"], 2.0, ctx)
    ctx.state["heard"]["c"] = -2
    assert not m.ready(arrived, ["c"], 2.0, ctx)
