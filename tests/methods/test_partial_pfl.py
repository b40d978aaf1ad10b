"""FedAlt: whose turn it is not stands still, bit for bit."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from rankfleet.federated.methods.personalization.partial_pfl import PartialPfl
from tests.edge_agent.rig import adapter, rig


def test_steps_are_shared_out() -> None:
    calls = []

    def fit(start: Any, only: Any, steps: int) -> Any:
        calls.append((steps, [k for k in start if only(k)]))
        return start

    ctx: Any = SimpleNamespace(fit=fit, steps=8)
    PartialPfl(share=0.25).train({"head.bias": 0, "m.A": 0}, ctx)
    assert calls == [(2, ["head.bias"]), (6, ["m.A"])]


def test_the_other_part_stands_still(tiny: Path) -> None:
    spec, tensors = adapter(tiny)
    for share, moves in ((1.0, "head."), (0.0, "encoder.")):
        trained = rig(tiny, {"p": PartialPfl(share=share)}, spec=spec, tensors=tensors).train()
        for k, t in trained.items():
            assert np.array_equal(t, tensors[k]) != k.startswith(moves), k


def test_the_personal_part_never_travels(tiny: Path) -> None:
    spec, tensors = adapter(tiny)
    trainer = rig(tiny, {"p": PartialPfl()}, spec=spec, tensors=tensors)
    trained = trainer.train()
    trainer.client.keep(trained)
    assert not any(k.startswith("head.") for k in trainer.client.send(trained))
    again = rig(tiny, {"p": PartialPfl()}, spec=spec, tensors=tensors, state=trainer.client.saved(), round=2)
    assert np.array_equal(again.start["head.weight"].numpy(), trained["head.weight"])
    assert np.array_equal(again.contexts["p"].received["head.weight"].numpy(), trained["head.weight"])
    assert np.array_equal(
        again.points.rest["head.weight"].numpy(), tensors["head.weight"]
    )  # until training stands at the start
