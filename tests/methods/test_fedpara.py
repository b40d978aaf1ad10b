"""FedPara: the pair of rank R² is the Hadamard product of two products."""

import numpy as np
import pytest
import torch

from rankfleet.federated.contract.catalogue import build
from rankfleet.federated.contract.spec import Pair, Spec

from .test_by_hand import RNG, client, server

SPEC = Spec({n: Pair(i, 20, 16, 0, 1.0, 20, 16, "v") for i, n in enumerate(("a", "b"))}, {})


@pytest.mark.parametrize("private", [False, True])
def test_the_product_is_hadamard_s(private: bool) -> None:
    m = build("fedpara", {"rank": 3, "private": private})
    first = {k: np.asarray(t.value) for k, t in m.tensors(SPEC, server()).items()}
    start = m.express(first, SPEC, np)
    assert not np.any(start["a.B"] @ start["a.A"])
    p = {k: RNG(i).standard_normal(t.shape) for i, (k, t) in enumerate(first.items())}
    pair = m.express(p, SPEC, np)
    goal = (p["a.B1"] @ p["a.A1"]) * (p["a.B2"] @ p["a.A2"] + private)
    assert np.allclose(pair["a.B"] @ pair["a.A"], goal)
    assert np.linalg.matrix_rank(goal) == (12 if private else 9)
    assert m.travels("a.A2", client()) is not private


def test_torch_and_numpy_agree() -> None:
    m = build("fedpara")
    p = {
        k: RNG(2).standard_normal(t.value.shape).astype(np.float32)
        for k, t in m.tensors(SPEC, server()).items()
    }
    ours, theirs = m.express(p, SPEC, np), m.express({k: torch.tensor(t) for k, t in p.items()}, SPEC, torch)
    assert ours.keys() == theirs.keys()
    assert all(np.allclose(t, theirs[k].numpy(), atol=1e-6) for k, t in ours.items())
