"""From admitted updates to the next version: reduce, step, apply. The one place where product and factor space part."""

from collections.abc import Iterable, Mapping

import numpy as np

from rankfleet.federated.contract.stack import ServerSide
from rankfleet.federated.contract.tensors import Array
from rankfleet.federated.contract.update import LowRank, Update
from rankfleet.federated.errors import WireError

from ..store.versions import Version
from . import stacked as aggregate
from . import streaming
from .stacked import Operator, Term

Change = dict[str, Array | Operator]


def next_version(server: ServerSide, old: Version, updates: Iterable[Update], devices: int, number: int) -> tuple[Version, list[Update]]:
    """The version after `updates` (in device order), and those that went in.

    Where no update came it is the old version itself; where methods admitted none of them, its tensors under the next number.
    Raises WireError where a method's result fits nothing, BadMethod where a method admits what it was not given.
    """
    server.left_out = {}
    if streams(server):
        pairs, means, used = streaming.product(updates, old.pairs, devices)
        dense = {k: (old.dense[k] + means[k]).astype(np.float32) if k in means else t for k, t in old.dense.items()}
        return Version(old.number + 1, {**old.pairs, **pairs}, dense, {}, {}), used
    arrived = list(updates)
    if not arrived:
        return old, []
    admitted = server.admit(arrived, number)
    if not admitted:
        return Version(old.number + 1, old.pairs, old.dense, {}, {}), []
    return step(old, reduce(server, admitted, number)), admitted


def streams(server: ServerSide) -> bool:
    """Is the default aggregate used, which reads updates once or twice in device order and keeps none?"""
    return server.stack.space == "product" and not any(server.stack.using(h) for h in ("admit", "reduce", "step"))


def reduce(server: ServerSide, updates: list[Update], number: int) -> Change:
    """The aggregate, after the stack's own `reduce` and `step` where it has them."""
    own = server.reduce(updates, number)
    change: Change = {}
    if own is not None:
        change = {k: _operator(v) for k, v in own.items()}
    elif server.stack.space == "product":
        change = dict(aggregate.product(updates))
    else:
        change = dict(aggregate.factor_mean(updates))
    if server.stack.using("step"):
        plain = {k: v.stacked() if isinstance(v, Operator) else v for k, v in change.items()}
        change = {k: _operator(v) for k, v in server.step(plain, number).items()}
    scale = next((p.scale for u in updates for p in u.spec.pairs.values()), 1.0)
    return {k: _unscaled(v, scale) if isinstance(v, Operator) else v for k, v in change.items()}


def _unscaled(change: Operator, scale: float) -> Operator:
    """Methods see s·(B₁A₁ - B₀A₀); a version holds B·A, which devices multiply by s."""
    return Operator(change.out, change.in_, lambda: [Term(b / scale, a) for b, a in change.terms()])


def _operator(value: Array | LowRank) -> Array | Operator:
    if isinstance(value, LowRank):
        return Operator(value.B.shape[0], value.A.shape[1], lambda: [Term(value.B, value.A)])
    return value


def step(old: Version, change: Mapping[str, Array | Operator]) -> Version:
    """The version after `change`. Raises WireError where a method's result fits nothing."""
    pairs, dense = dict(old.pairs), dict(old.dense)
    for name, value in sorted(change.items()):
        if isinstance(value, Operator):
            pair = pairs[name]
            pairs[name] = aggregate.merge(pair, value, pair.A.shape[0])
        elif name[:-2] in pairs and name.endswith((".A", ".B")):
            pairs[name[:-2]] = _moved(pairs[name[:-2]], name[-1], value)
        elif name in dense and dense[name].shape == value.shape:
            dense[name] = (dense[name] + value).astype(np.float32)
        else:
            raise WireError(f"the aggregate holds `{name}`, which the adapter does not have in that shape")
    return Version(old.number + 1, pairs, dense, {}, {})


def _moved(pair: LowRank, side: str, delta: Array) -> LowRank:
    b, a = pair.B.astype(np.float32), pair.A.astype(np.float32)
    if side == "B":
        b = b.copy()
        b[:, : delta.shape[1]] += delta
    else:
        a = a.copy()
        a[: delta.shape[0]] += delta
    return LowRank(b, a)
