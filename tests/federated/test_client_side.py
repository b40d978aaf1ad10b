"""The device's side of a stack: what is trained, what stays, and what comes back when it travels again."""

from typing import Any

import numpy as np
import pytest

from rankfleet.federated.contract.client_side import ClientSide
from rankfleet.federated.contract.contexts import ClientContext, Round
from rankfleet.federated.contract.method import Method
from rankfleet.federated.contract.spec import Dense, Pair, Spec
from rankfleet.federated.contract.stack import Stack
from rankfleet.federated.contract.tensors import Tensors
from rankfleet.federated.errors import HookError

SPEC = Spec(
    {"m": Pair(0, 3, 4, 2, 1.0, 3, 4, "v")},
    {"head.weight": Dense((2, 3)), "mask": Dense((2,), trained=False)}
)  # fmt: skip


class Turns(Method, frozen=True):
    """A travels in even rounds, B in odd ones; device d1 keeps its head too."""

    def travels(self, name: str, ctx: ClientContext) -> bool:
        if name.startswith("head."):
            return ctx.device != "d1"
        return not name.endswith((".A", ".B")) or name.endswith("AB"[ctx.round.number % 2])


class Phase(Method, frozen=True):
    """The head is not trained in round 1, unless the coordinator says so."""

    def trains(self, name: str, ctx: ClientContext) -> bool:
        return (
            not name.startswith("head.") or ctx.round.number != 1 or bool(ctx.down.get("all", np.zeros(1))[0])
        )


def side(
    methods: dict[str, Method],
    number: int,
    *,
    device: str = "d0",
    state: dict[str, Any] | None = None,
    **down: Tensors,
) -> ClientSide:
    return ClientSide(
        Stack(methods, "factors"),
        "j",
        Round(number, 5),
        device,
        SPEC,
        steps=1,
        lr=0.1,
        down=down,
        state=state,
    )


def ones(value: float) -> Tensors:
    return {k: np.full(s, value, np.float32) for k, s in SPEC.shapes().items()}


def test_a_tensor_that_travels_again_starts_from_what_arrives() -> None:
    first = side({"turns": Turns()}, 0)
    first.keep(ones(7.0))
    second = side({"turns": Turns()}, 1, state=first.saved())
    assert second.own().keys() == {"m.A"}
    second.keep(ones(8.0))
    third = side({"turns": Turns()}, 2, state=second.saved())
    assert third.own().keys() == {"m.B"}
    assert third.own()["m.B"][0, 0] == 8.0


def test_devices_differ_in_what_they_keep() -> None:
    one = side({"turns": Turns()}, 0, device="d1")
    one.keep(ones(7.0))
    assert side({"turns": Turns()}, 0, device="d1", state=one.saved()).own().keys() == {"m.B", "head.weight"}
    assert set(one.send(ones(1.0))) == {"m.A"}


def test_constants_are_not_trained_and_phases_hear_the_coordinator() -> None:
    assert not side({}, 1).trains("mask")
    assert side({}, 1).trains("head.weight")
    assert not side({"phase": Phase()}, 1).trains("head.weight")
    assert side({"phase": Phase()}, 1, phase={"all": np.ones(1)}).trains("head.weight")
    assert side({"phase": Phase()}, 2).travels("head.weight")


def test_what_stays_is_used_though_it_is_not_trained_now() -> None:
    """A personal part whose turn it is not is still the personal one."""
    both = {"turns": Turns(), "phase": Phase()}
    first = side(both, 0, device="d1")
    first.keep(ones(7.0))
    assert "head.weight" in side(both, 1, device="d1", state=first.saved()).own()


class Bad(Method, frozen=True):
    """Wrong results."""

    hook: str = ""

    def begin(self, adapter: Tensors, ctx: ClientContext) -> Tensors:
        assert ctx.received is adapter
        assert not ctx.start
        return {"m.A": adapter["m.A"].T} if self.hook == "begin" else {k: t + 1 for k, t in adapter.items()}

    def send(self, delta: Tensors, ctx: ClientContext) -> Tensors:
        assert ctx.start["m.A"][0, 0] == ctx.received["m.A"][0, 0] + 1
        ctx.state["note"] = {1, 2} if self.hook == "send" else 1
        return delta

    def serve(self, adapter: Tensors, ctx: ClientContext) -> Tensors:
        return {}


def test_wrong_results_are_said_by_method_hook_and_name() -> None:
    with pytest.raises(
        HookError, match=r"method `bad`, hook `begin`: gives `m.A` of shape \(4, 2\) instead of \(2, 4\)"
    ):
        side({"bad": Bad(hook="begin")}, 0).begin(ones(1.0))
    client = side({"bad": Bad(hook="send")}, 0)
    client.begin(ones(1.0))
    with pytest.raises(HookError, match="method `bad`, hook `send`: leaves a set in `ctx.state` as `note`"):
        client.send(ones(1.0))
    with pytest.raises(HookError, match="hook `serve`: leaves out `head.weight`"):
        client.serve(ones(1.0))
