"""The deterministic simulation: some seeds, that a seed is one run, and that what it is there to find is
found."""

from pathlib import Path

import pytest

from .simulation import run as simulation
from .simulation.defects import DEFECTS
from .simulation.run import Outcome, simulate


@pytest.fixture(scope="module")
def clean(tiny: Path) -> Outcome:
    outcome = simulate(-1, tiny, faults=0)
    assert not outcome.wrong
    return outcome


@pytest.mark.parametrize("seed", range(8))
def test_whatever_happens_the_result_is_the_same(tiny: Path, clean: Outcome, seed: int) -> None:
    outcome = simulate(seed, tiny)
    assert outcome.wrong == []
    assert sum(outcome.faults.values()) >= 40
    assert outcome.ledger == clean.ledger
    assert outcome.versions == clean.versions


def test_one_seed_is_one_run(tiny: Path) -> None:
    assert simulate(11, tiny) == simulate(11, tiny)
    assert simulate(12, tiny).faults != simulate(11, tiny).faults


@pytest.mark.parametrize(
    "name", ["an update is on disk before its receipt", "what arrives is checked against its digest"]
)
def test_a_guard_that_is_missing_is_noticed(
    tiny: Path, clean: Outcome, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(simulation, "LIMIT_S", 900.0)
    with DEFECTS[name]():
        assert any(
            o.wrong or o.versions != clean.versions for o in (simulate(seed, tiny) for seed in range(20))
        )
    assert len(DEFECTS) >= 12
