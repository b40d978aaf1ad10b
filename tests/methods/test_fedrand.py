"""FedRand: one factor travels, by lot; it starts from what arrived, the other from the device's own."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rankfleet.edge_agent.worker.local_round import LocalRound
from rankfleet.federated.contract.contexts import ClientContext, Round
from rankfleet.federated.methods.privacy.fedrand import FedRand
from tests.edge_agent.rig import adapter, rig
from tests.world import World, job

from .test_by_hand import RNG, spec


def context(device: str, number: int) -> ClientContext:
    return ClientContext(Round(number, 9), device, spec(), {}, {}, RNG(0), {}, {}, 2, 0.1)


def test_one_factor_by_lot_and_heads_always() -> None:
    m = FedRand()
    for number in range(8):
        ctx = context("d0", number)
        assert m.travels("x.A", ctx) != m.travels("x.B", ctx)
        assert m.travels("x.A", ctx) == m.travels("y.A", ctx) == m.travels("x.A", ctx)
        assert m.travels("head.weight", ctx)


def test_each_device_draws_as_often_as_rho_says() -> None:
    for share, seed in ((0.5, 0), (0.2, 3)):
        m = FedRand(share=share, seed=seed)
        public = [m.public("d0", n) == ".A" for n in range(2000)]
        assert np.mean(public) == pytest.approx(share, abs=0.03)  # three deviations of a mean of 2000
    lots = {d: [FedRand().public(d, n) for n in range(20)] for d in ("d0", "d1")}
    assert lots["d0"] != lots["d1"]
    assert {FedRand(share=s).public("d", n) for s, side in ((1.0, ".A"), (0.0, ".B")) for n in range(20)} == {
        ".A",
        ".B",
    }
    assert all(FedRand(share=1.0).public("d", n) == ".A" for n in range(20))


def test_both_are_trained_and_the_private_one_is_kept_and_not_sent(tiny: Path) -> None:
    tensors_spec, tensors = adapter(tiny)
    first = rig(tiny, {"f": FedRand(share=1.0)}, spec=tensors_spec, tensors=tensors)
    trained = first.train()
    a, b = (next(k for k in trained if k.endswith(s)) for s in (".A", ".B"))
    assert not np.array_equal(trained[a], tensors[a])
    assert not np.array_equal(trained[b], tensors[b])
    first.client.keep(trained)
    sent = first.client.send(trained)
    assert a in sent
    assert not any(k.endswith(".B") for k in sent)
    again = rig(
        tiny,
        {"f": FedRand(share=1.0)},
        spec=tensors_spec,
        tensors=tensors,
        state=first.client.saved(),
        round=2,
    )
    assert np.array_equal(again.start[a].numpy(), tensors[a])  # as it arrived
    assert np.array_equal(again.start[b].numpy(), trained[b])  # its own
    turned = rig(
        tiny,
        {"f": FedRand(share=0.0)},
        spec=tensors_spec,
        tensors=tensors,
        state=first.client.saved(),
        round=2,
    )
    assert np.array_equal(turned.start[b].numpy(), tensors[b])
    assert np.array_equal(turned.start[a].numpy(), trained[a])


async def test_whatever_travels_starts_from_what_arrived(
    tmp_path: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In every round of a job, also after a factor was private for a while."""
    rounds: list[tuple[set[str], set[str]]] = []
    real = LocalRound.__init__

    def init(self: LocalRound, *args: Any) -> None:
        real(self, *args)
        public = {k for k in self.view.spec.shapes() if self.client.travels(k)}
        own = {
            k for k in self.view.spec.shapes() if not np.array_equal(self.received[k], self.view.tensors[k])
        }
        rounds.append((public, own))

    monkeypatch.setattr(LocalRound, "__init__", init)
    async with World(tmp_path, tiny, devices=2) as world:
        await world.run(job(stack=["fedrand"], rounds=5))
    assert all(not public & own for public, own in rounds)
    assert sum(bool(own) for _, own in rounds) > 4  # the private one is the device's own
    assert len({frozenset(public) for public, _ in rounds}) == 2
