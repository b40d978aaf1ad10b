"""A device's state means what its name says: every array lives in the coordinates of the spec that uses
it, or is gone."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rankfleet.federated.contract.catalogue import build_stack
from rankfleet.federated.contract.client_side import ClientSide
from rankfleet.federated.contract.contexts import Round
from rankfleet.federated.contract.spec import Pair, Spec
from rankfleet.federated.contract.stack import Stack

LAYERS = 4


def spec(depth: int, kept: int, view: str, rank: int = 2) -> Spec:
    layers = range(LAYERS - depth, LAYERS)
    return Spec({f"layer.{i}.query": Pair(i, 8, 8, rank, 2.0, kept, 8, view) for i in layers}, {})


def one_round(state: dict[str, Any] | None, number: int, held: Spec, stack: list[Any]) -> ClientSide:
    rng = np.random.default_rng(number)
    side = ClientSide(
        Stack(build_stack(stack)), "j", Round(number, 99), "d", held, steps=1, lr=0.1, down={}, state=state
    )
    side.begin({k: np.zeros(s, np.float32) for k, s in held.shapes().items()})
    side.send({k: rng.standard_normal(s).astype(np.float32) for k, s in held.shapes().items()})
    return side


def arrays(tree: dict[str, Any]) -> list[tuple[str, np.ndarray[Any, Any]]]:
    rows = []
    for key, value in tree.items():
        rows += (
            arrays(value)
            if isinstance(value, dict)
            else [(key, value)]
            if isinstance(value, np.ndarray)
            else []
        )
    return rows


held_by = st.builds(
    spec,
    st.integers(1, LAYERS),
    st.sampled_from([4, 6, 8]),
    st.sampled_from(["old", "new"]),
    st.sampled_from([1, 2]),
)


@given(st.lists(held_by, min_size=2, max_size=8), st.sampled_from([["sparse"], [{"sparse": {"keep": 0.1}}]]))
@settings(max_examples=60, deadline=None)
def test_every_array_has_the_shape_and_lineage_of_the_spec_that_uses_it(
    specs: list[Spec], stack: list[Any]
) -> None:
    state: dict[str, Any] | None = None
    written: dict[str, str] = {}
    for number, held in enumerate(specs):
        side = ClientSide(
            Stack(build_stack(stack)),
            "j",
            Round(number, 99),
            "d",
            held,
            steps=1,
            lr=0.1,
            down={},
            state=state,
        )
        shapes = held.shapes()
        for name, array in arrays(side.state):
            if name in shapes:
                assert array.shape == shapes[name]
                pair = held.pairs[name[:-2]]
                assert written[name] == f"{pair.view}:{pair.rank}:{pair.kept_out}"
        side = one_round(state, number, held, stack)
        state = side.saved()
        for name in shapes:
            pair = held.pairs[name[:-2]]
            written[name] = f"{pair.view}:{pair.rank}:{pair.kept_out}"


@pytest.mark.parametrize(("kept", "view"), [(6, "old"), (8, "new")])
def test_layers_that_were_away_during_a_change_come_back_without_state(kept: int, view: str) -> None:
    state = one_round(None, 0, spec(3, 8, "old"), ["sparse"]).saved()
    state = one_round(state, 1, spec(1, 8, "old"), ["sparse"]).saved()
    side = ClientSide(
        Stack(build_stack(["sparse"])),
        "j",
        Round(2, 9),
        "d",
        spec(3, kept, view),
        steps=1,
        lr=0.1,
        down={},
        state=state,
    )
    assert arrays(side.state["sparse"]) == []


def test_layers_that_were_away_and_did_not_change_keep_their_state() -> None:
    state = one_round(None, 0, spec(3, 8, "old"), ["sparse"]).saved()
    state = one_round(state, 1, spec(1, 8, "old"), ["sparse"]).saved()
    side = ClientSide(
        Stack(build_stack(["sparse"])),
        "j",
        Round(2, 9),
        "d",
        spec(3, 8, "old"),
        steps=1,
        lr=0.1,
        down={},
        state=state,
    )
    assert {name[:7] for name, _ in arrays(side.state["sparse"])} == {"layer.1", "layer.2", "layer.3"}


def test_coordinates_of_what_has_no_state_are_forgotten() -> None:
    state = one_round(None, 0, spec(3, 8, "old"), []).saved()
    state = one_round(state, 1, spec(1, 8, "old"), []).saved()
    assert {name[:7] for name in state["\0coordinates"]} == {"layer.3"}
