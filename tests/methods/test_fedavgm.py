"""FedAvgM against its recurrence, worked by hand."""

import numpy as np

from rankfleet.federated.contract.catalogue import build

from .test_by_hand import server


def test_momentum_adds_up() -> None:
    # β = ½, η = 2: v = [4], then ½·4 + 1 = [3]; steps 8 and 6
    m, ctx = build("fedavgm", {"beta": 0.5, "lr": 2.0}), server()
    assert m.step({"w": np.array([4.0], np.float32)}, ctx)["w"].tolist() == [8.0]
    assert m.step({"w": np.array([1.0], np.float32)}, ctx)["w"].tolist() == [6.0]


def test_a_name_that_is_away_keeps_its_momentum() -> None:
    m, ctx = build("fedavgm", {"beta": 0.5}), server()
    m.step({"w": np.array([4.0], np.float32)}, ctx)
    assert set(m.step({"u": np.array([1.0], np.float32)}, ctx)) == {"u"}
    assert m.step({"w": np.array([0.0], np.float32)}, ctx)["w"].tolist() == [2.0]
