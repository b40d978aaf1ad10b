"""Whoever writes a method hears by method, hook and name what is wrong with it: on both sides."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from rankfleet.federated.contract.client_side import ClientSide
from rankfleet.federated.contract.contexts import Adapter, Member, Round, Tensor
from rankfleet.federated.contract.method import Method
from rankfleet.federated.contract.server_side import ServerSide
from rankfleet.federated.contract.spec import Dense, Pair, Spec
from rankfleet.federated.contract.stack import Stack
from rankfleet.federated.contract.update import LowRank
from rankfleet.federated.errors import HookError, Refused

SPEC = Spec({"m": Pair(0, 4, 3, 2, 1.0, 4, 3, "v")}, {"head": Dense((2,))})
ADAPTER = Adapter({"m": LowRank(np.zeros((4, 2)), np.zeros((2, 3)))}, {"head": np.zeros(2, np.float32)})
ASK = {"placement": {"m": 2}, "rank": 2, "steps": 3, "lr": 0.1}
VIEW = {
    "m.A": np.zeros((2, 3), np.float32),
    "m.B": np.zeros((4, 2), np.float32),
    "head": np.zeros(2, np.float32),
}


def method(hook: str, answer: Callable[..., Any]) -> Method:
    """A method that has one hook, which answers so."""
    namespace = {hook: lambda self, *args: answer(*args), "__module__": __name__, "__qualname__": "Mine"}
    return type(Method)("Mine", (Method,), namespace, frozen=True)()  # type: ignore[call-overload]


def server(hook: str, answer: Callable[..., Any]) -> Any:
    side = ServerSide(Stack({"mine": method(hook, answer)}, "factors"), "job", 3)
    side.adapter = ADAPTER
    calls: dict[str, Callable[[], Any]] = {
        "select": lambda: side.select([Member("a")], 0),
        "plan": lambda: side.plan(ASK, "a", 0),  # type: ignore[arg-type]
        "offer": lambda: side.offer(VIEW, "a", 0),
        "ready": lambda: side.ready([], ["a"], 1.0, 0),
        "weigh": lambda: list(side.weigh([SimpleNamespace(device="a", age=0)], 0)),  # type: ignore[list-item]
        "admit": lambda: side.admit([], 0),
        "reduce": lambda: side.reduce([], 0),
        "step": lambda: side.step({}, 0),
        "tensors": lambda: side.tensors(SPEC),
    }
    return calls[hook]()


def client(hook: str, answer: Callable[..., Any]) -> Any:
    stack = Stack({"mine": method(hook, answer)}, "factors")
    side = ClientSide(stack, "job", Round(0, 3), "a", SPEC, steps=1, lr=0.1, down={})
    start = side.begin(VIEW)
    return {"begin": lambda: start, "send": lambda: side.send(VIEW), "serve": lambda: side.serve(VIEW)}[
        hook
    ]()


def fails(*args: Any) -> Any:
    raise KeyError("layer.7")


@pytest.mark.parametrize(
    "hook", ["select", "plan", "offer", "ready", "weigh", "admit", "reduce", "step", "tensors"]
)
def test_a_mistake_in_a_server_hook_names_it(hook: str) -> None:
    with pytest.raises(HookError, match=f"method `mine`, hook `{hook}`: KeyError: 'layer.7'"):
        server(hook, fails)


@pytest.mark.parametrize("hook", ["begin", "send", "serve"])
def test_a_mistake_in_a_client_hook_names_it(hook: str) -> None:
    with pytest.raises(HookError, match=f"method `mine`, hook `{hook}`: KeyError: 'layer.7'"):
        client(hook, fails)


@pytest.mark.parametrize(
    ("hook", "result", "reason"),
    [
        ("plan", None, "which is no dictionary"),
        ("plan", {"steps": 1}, "leaves out `lr`"),
        ("plan", {**ASK, "placement": {"n": 1}}, "gives `n` rank 1"),
        ("offer", None, "which is no dictionary"),
        ("offer", {"other": np.zeros(2)}, "gives `other`, which is not asked for"),
        ("offer", {"head": np.zeros(3)}, r"gives `head` of shape \(3,\)"),
        ("offer", {"head": torch.zeros(2)}, "gives `head` as a torch Tensor"),
        ("reduce", None, "which is no dictionary"),
        ("reduce", {"head": np.array(["a", "b"])}, "in dtype <U1"),
        ("step", None, "which is no dictionary"),
        ("step", {"head": np.zeros(5)}, "which the adapter does not have"),
        ("step", {"head": torch.zeros(2)}, "gives `head` as a torch Tensor"),
        ("tensors", None, "which is no dictionary"),
        ("tensors", {"gain": np.ones(1)}, "gives `gain` as a ndarray"),
        ("tensors", {"gain": Tensor(torch.ones(1))}, "gives `gain` as a torch Tensor"),  # type: ignore[arg-type]
    ],
)
def test_what_a_server_hook_must_not_return(hook: str, result: Any, reason: str) -> None:
    with pytest.raises(HookError, match=f"method `mine`, hook `{hook}`: .*{reason}"):
        server(hook, lambda *args: result)


@pytest.mark.parametrize("hook", ["plan", "offer", "admit", "reduce", "step", "tensors"])
def test_a_torch_tensor_in_a_servers_state(hook: str) -> None:
    good = {"plan": ASK, "admit": []}.get(hook, {})

    def keeps(*args: Any) -> Any:
        args[-1].state["last"] = torch.zeros(2)
        return good

    with pytest.raises(HookError, match=f"hook `{hook}`: leaves a torch Tensor in `ctx.state` as `last`"):
        server(hook, keeps)


@pytest.mark.parametrize("hook", ["begin", "send", "serve"])
@pytest.mark.parametrize(
    ("result", "reason"), [(None, "which is no dictionary"), ({"head": torch.zeros(2)}, "as a torch Tensor")]
)
def test_what_a_client_hook_must_not_return(hook: str, result: Any, reason: str) -> None:
    with pytest.raises(HookError, match=f"method `mine`, hook `{hook}`: .*{reason}"):
        client(hook, lambda *args: result)


@pytest.mark.parametrize(
    "error", [Refused("no data here"), MemoryError(), RuntimeError("not enough memory: 3 GB")]
)
def test_what_others_wait_for_passes(error: Exception) -> None:
    def raises(*args: Any) -> Any:
        raise error

    with pytest.raises(type(error)) as caught:
        client("send", raises)
    assert caught.value is error
