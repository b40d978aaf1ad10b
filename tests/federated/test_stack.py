"""The stack: order of hooks, conflicts, spaces, state that is dropped when its coordinates change."""

from typing import ClassVar

import numpy as np
import pytest

from rankfleet.federated.contract.catalogue import build, build_stack, entries, modules
from rankfleet.federated.contract.client_side import ClientSide
from rankfleet.federated.contract.contexts import ClientContext, Round
from rankfleet.federated.contract.method import EXCLUSIVE, HOOKS, Method, overrides
from rankfleet.federated.contract.spec import Dense, Pair, Spec
from rankfleet.federated.contract.stack import Stack, seed_of
from rankfleet.federated.contract.tensors import Tensors
from rankfleet.federated.errors import ConfigError, Conflict, UnknownMethod


def spec(rank: int = 2, view: str = "v", kept: int = 6) -> Spec:
    return Spec({"m": Pair(0, 6, 4, rank, 2.0, kept, 4, view)}, {"head": Dense((3,))})


def side(stack: Stack, state: dict | None = None, **kw: object) -> ClientSide:
    return ClientSide(stack, "job", Round(0, 3), "d0", spec(**kw), steps=2, lr=0.1, down={}, state=state)  # type: ignore[arg-type]


def test_unknown_method_names_the_nearest() -> None:
    with pytest.raises(UnknownMethod, match="did you mean `fedprox`"):
        build("fedprx")


def test_unknown_setting_and_range() -> None:
    with pytest.raises(ConfigError, match="unknown field `muu`.*\n  try: its settings are: mu"):
        build("fedprox", {"muu": 3})
    with pytest.raises(ConfigError, match="<= 1"):
        build("sparse", {"keep": 2.0})


def test_a_stack_entry_names_one_method_once() -> None:
    with pytest.raises(ConfigError, match="names one method"):
        build_stack([{"sparse": {}, "qsgd": {}}])
    with pytest.raises(ConfigError, match="twice"):
        build_stack(["sparse", {"sparse": {"keep": 0.5}}])


@pytest.mark.parametrize("hook", EXCLUSIVE)
def test_two_methods_with_one_exclusive_hook_are_refused_with_both_names(hook: str) -> None:
    kinds = [
        type(n, (Method,), {hook: lambda self, *a: None, "__module__": __name__}, frozen=True) for n in "AB"
    ]
    with pytest.raises(Conflict, match=f"`a` and `b` both define `{hook}`"):
        Stack({"a": kinds[0](), "b": kinds[1]()})


def test_two_spaces_are_refused_with_both_names() -> None:
    class NeedsProduct(Method, frozen=True):
        space: ClassVar[str] = "product"  # type: ignore[assignment]

    with pytest.raises(Conflict, match="`ffa_lora` needs factors.*`p` needs"):
        Stack({"ffa_lora": build("ffa_lora"), "p": NeedsProduct()})
    assert Stack({"ffa_lora": build("ffa_lora")}).space == "factors"
    assert Stack({}).space == "product"


def test_nothing_reads_data_after_a_release() -> None:
    class Private(Method, frozen=True):
        releases: ClassVar[bool] = True

        def send(self, delta: Tensors, ctx: ClientContext) -> Tensors:
            return delta

    with pytest.raises(Conflict, match="`sparse` changes what leaves the device after `dp`"):
        Stack({"dp": Private(), "sparse": build("sparse")})
    Stack({"sparse": build("sparse"), "dp": Private()})


def test_state_goes_when_its_coordinates_change_and_only_then() -> None:
    class Remember(Method, frozen=True):
        def send(self, delta: Tensors, ctx: ClientContext) -> Tensors:
            ctx.state["memory"] = dict(delta)
            return delta

    stack = Stack({"r": Remember()})
    client = side(stack)
    delta = {"m.A": np.ones((2, 4)), "m.B": np.ones((6, 2)), "head": np.ones(3)}
    client.begin(delta)
    client.send(delta)
    saved = client.saved()
    assert set(side(stack, saved).state["r"]["memory"]) == {"m.A", "m.B", "head"}
    for change in ({"rank": 4}, {"view": "other"}, {"kept": 5}):
        assert set(side(stack, saved, **change).state["r"]["memory"]) == {"head"}


def test_seeds_depend_on_every_word() -> None:
    assert seed_of("a", 1) == seed_of("a", 1)
    assert len({seed_of("a", 1), seed_of("a", 2), seed_of("a1"), seed_of("b", 1)}) == 4


@pytest.mark.parametrize("name", sorted(modules()))
def test_every_method_keeps_the_contract(name: str) -> None:
    method = build(name)
    assert any(overrides(method, h) for h in HOOKS), "a method overrides at least one hook"
    assert type(method).__struct_config__.frozen
    assert type(method).__struct_config__.forbid_unknown_fields
    entry = next(e for e in entries() if e.name == name)
    assert entry.summary
    assert entry.use_when
    assert entry.evidence in ("direction reproduced", "toy-checked", "reconstructed", "simulation only")
    assert entry.space == type(method).space
    assert set(entry.hooks) == {h for h in HOOKS if overrides(method, h)}
    for hook in entry.hooks:
        assert getattr(type(method), hook).__doc__, f"{name}.{hook} says what it does"


def test_the_catalogue_touches_every_side_and_space() -> None:
    hooks = {h for e in entries() for h in e.hooks}
    assert {
        "select",
        "offer",
        "begin",
        "train",
        "loss",
        "grad",
        "serve",
        "send",
        "receive",
        "ready",
        "admit",
        "reduce",
        "step",
        "trains",
    } <= hooks
    assert {e.space for e in entries()} >= {"any", "factors"}
