"""Fed-SB: a mean of R is a mean of products; constants are had, not trained."""

import numpy as np

from rankfleet.federated.contract.catalogue import build
from rankfleet.federated.contract.spec import Pair, Spec

from .test_by_hand import RNG, server

SPEC = Spec({n: Pair(i, 6, 4, 0, 1.0, 6, 4, "v") for i, n in enumerate(("a", "b"))}, {})


def test_averaging_is_exact_and_the_start_is_zero() -> None:
    m = build("fed_sb", {"rank": 3})
    added = m.tensors(SPEC, server())
    assert {k for k, t in added.items() if t.trained} == {"a.R", "b.R"}
    first = {k: np.asarray(t.value) for k, t in added.items()}
    assert np.allclose(first["a.left"].T @ first["a.left"], np.eye(3))
    start = m.express(first, SPEC, np)
    assert not np.any(start["a.B"] @ start["a.A"])
    cores = [RNG(i).standard_normal((3, 3)) for i in range(3)]
    each = [m.express({**first, "a.R": r}, SPEC, np) for r in cores]
    mean = m.express({**first, "a.R": np.mean(cores, 0)}, SPEC, np)
    assert np.allclose(np.mean([e["a.B"] @ e["a.A"] for e in each], 0), mean["a.B"] @ mean["a.A"])


def test_the_constants_are_the_same_after_a_restart() -> None:
    one, two = (build("fed_sb").tensors(SPEC, server()) for _ in range(2))
    assert all(np.array_equal(one[k].value, two[k].value) for k in one)
