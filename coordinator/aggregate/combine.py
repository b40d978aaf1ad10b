"""From updates to the next version: weigh, admit, reduce, step, apply. The one place where product and
factor space part.

Updates are read from disk in device order, and what they decode to is kept as far as there is room for it
(`incoming.Keeper`): memory does not grow with the fleet, unless a method says that it `needs_all`.
"""

from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from rankfleet.federated.contract.contexts import Adapter
from rankfleet.federated.contract.server_side import ServerSide
from rankfleet.federated.contract.stack import Change
from rankfleet.federated.contract.tensors import Array
from rankfleet.federated.contract.update import LowRank, Update
from rankfleet.federated.errors import WireError

from ..store.versions import Version
from . import stacked as aggregate
from . import streaming
from .stacked import Operator, Term

Moves = dict[str, Array | Operator]
"""A change of the adapter as the engine applies it, without s."""
WIDE = 3
"""Ranks of the server that a change keeps where `step` looks at it in product space: what is beyond them
is lost in the new factors."""


def next_version(
    server: ServerSide, old: Version, updates: Iterable[Update], devices: int, number: int
) -> tuple[Version, list[Update]]:
    """The version after `updates` (in device order), and those that went in.

    Where no update came it is the old version itself; where methods let none of them in, its tensors under
    the next number. Raises WireError where a method's result fits nothing, HookError where a method gives
    what it must not.
    """
    server.left_out = {}
    server.adapter = Adapter(old.pairs, old.dense, old.carry)
    server.mean = lambda some: mean(server, some)
    server.carry = {}
    try:
        if server.leg(number) != "train":
            version, used = _heard(server, old, list(updates), number)
        elif streams(server):
            version, used = _streamed(server, old, server.weigh(updates, number), devices, number)
        else:
            version, used = _collected(server, old, list(server.weigh(updates, number)), number)
        version.carry = carried(old.carry, server.carry)
        return version, used
    finally:
        server.updates, server.carry = (), {}


def streams(server: ServerSide) -> bool:
    """Is the default aggregate in product space used, which reads updates once or twice and makes new
    factors at once?"""
    return server.stack.space == "product" and not any(server.stack.using(h) for h in ("admit", "reduce"))


def _streamed(
    server: ServerSide, old: Version, updates: Iterable[Update], devices: int, number: int
) -> tuple[Version, list[Update]]:
    if server.stack.using("step"):
        zero = {m: _nothing(p, WIDE) for m, p in old.pairs.items()}
        pairs, means, used = streaming.product(updates, zero, devices)
        if not used:
            return _unchanged(server, old), []
        scale = scale_of(used)
        server.updates = used
        change: Change = {**means, **{m: LowRank(p.B * scale, p.A) for m, p in pairs.items()}}
        return step(old, _moves(server.step(change, number), scale)), used
    pairs, means, used = streaming.product(updates, old.pairs, devices)
    dense = {
        k: (old.dense[k] + means[k]).astype(np.float32) if k in means else t for k, t in old.dense.items()
    }
    return Version(old.number + 1, {**old.pairs, **pairs}, dense, {}, {}), used


def _nothing(pair: LowRank, times: int) -> LowRank:
    """A zero pair of `times` the rank, at most that of the map."""
    out, in_ = pair.B.shape[0], pair.A.shape[1]
    rank = min(times * pair.A.shape[0], out, in_)
    return LowRank(np.zeros((out, rank)), np.zeros((rank, in_)))


def _collected(
    server: ServerSide, old: Version, found: list[Update], number: int
) -> tuple[Version, list[Update]]:
    """Where methods see updates together, or the mean is that of factors."""
    admitted = server.admit(found, number) if found else []
    if not admitted:
        return _unchanged(server, old), []
    server.updates = admitted
    return step(old, reduce(server, admitted, number)), admitted


def _unchanged(server: ServerSide, old: Version) -> Version:
    """After a round in which methods let nothing in: what there was, under the next number."""
    return Version(old.number + 1, old.pairs, old.dense, {}, {}) if server.left_out else old


def _heard(
    server: ServerSide, old: Version, answers: list[Update], number: int
) -> tuple[Version, list[Update]]:
    """A leg in which nothing was trained. Late answers are to another leg's question: no method hears
    them."""
    change = server.hear({u.device: u.extra for u in answers if not u.age}, number)
    if change:
        change = server.step(change, number)
    return step(old, _moves(change, scale_of(answers))), answers


def mean(server: ServerSide, updates: Sequence[Update]) -> Change:
    """The engine's own aggregate of some updates, as methods see it."""
    if server.stack.space == "product":
        return {
            k: v.stacked() if isinstance(v, Operator) else v for k, v in aggregate.product(updates).items()
        }
    return dict(aggregate.factor_mean(updates))


def reduce(server: ServerSide, updates: list[Update], number: int) -> Moves:
    """The aggregate, after the stack's own `reduce` and `step` where it has them."""
    own, scale = server.reduce(updates, number), scale_of(updates)
    if own == {} and len(server.stack.legs) > 1:
        return {}  # `hear` will say what changes, and `step` sees that
    if own is None and not server.stack.using("step"):
        default = (
            aggregate.product(updates) if server.stack.space == "product" else aggregate.factor_mean(updates)
        )
        return {k: _unscaled(v, scale) if isinstance(v, Operator) else v for k, v in default.items()}
    return _moves(server.step(mean(server, updates) if own is None else own, number), scale)


def scale_of(updates: Sequence[Update]) -> float:
    """s, the same for all maps of a job."""
    return next((p.scale for u in updates for p in u.spec.pairs.values()), 1.0)


def _moves(change: Mapping[str, Array | LowRank], scale: float) -> Moves:
    """What methods say in s·B·A, as the engine applies it."""
    return {k: _unscaled(_operator(v), scale) if isinstance(v, LowRank) else v for k, v in change.items()}


def _unscaled(change: Operator, scale: float) -> Operator:
    """Methods see s·(B₁A₁ - B₀A₀); a version holds B·A, which devices multiply by s."""
    return Operator(change.out, change.in_, lambda: [Term(b / scale, a) for b, a in change.terms()])


def _operator(pair: LowRank) -> Operator:
    return Operator(pair.B.shape[0], pair.A.shape[1], lambda: [Term(pair.B, pair.A)])


def step(old: Version, change: Moves) -> Version:
    """The version after `change`. Raises WireError where a method's result fits nothing."""
    pairs, dense = dict(old.pairs), dict(old.dense)
    for name, value in sorted(change.items()):
        if isinstance(value, Operator):
            pair = pairs[name]
            pairs[name] = aggregate.merge(pair, value, pair.A.shape[0])
        elif name[:-2] in pairs and name.endswith((".A", ".B")):
            pairs[name[:-2]] = _moved(pairs[name[:-2]], name[-1], value)
        elif name in dense and dense[name].shape == value.shape:
            dense[name] = (dense[name] + value).astype(dense[name].dtype)
        else:
            raise WireError(f"the aggregate holds `{name}`, which the adapter does not have in that shape")
    return Version(old.number + 1, pairs, dense, {}, {})


def carried(old: Mapping[str, LowRank], more: Mapping[str, LowRank]) -> dict[str, LowRank]:
    """What is applied frozen, and what comes to it; of the map's own rank where it would be larger. Raises
    WireError."""
    total = dict(old)
    for module, new in more.items():
        before = total.get(module, LowRank(new.B[:, :0], new.A[:0]))
        if (len(before.B), before.A.shape[1]) != (len(new.B), new.A.shape[1]):
            raise WireError(
                f"`ctx.carry` of `{module}` is {len(new.B)} by {new.A.shape[1]}, not as large as before"
            )
        b, a = np.concatenate([before.B, new.B], axis=1), np.concatenate([before.A, new.A], axis=0)
        if b.shape[1] > (most := min(b.shape[0], a.shape[1])):
            b, a = aggregate.balanced(*aggregate.by_qr(LowRank(b, a)), most)
        total[module] = LowRank(b.astype(np.float32), a.astype(np.float32))
    return total


def _moved(pair: LowRank, side: str, delta: Array) -> LowRank:
    b, a = pair.B.astype(np.float32), pair.A.astype(np.float32)
    if side == "B":
        b = b.copy()
        b[:, : delta.shape[1]] += delta
    else:
        a = a.copy()
        a[: delta.shape[0]] += delta
    return LowRank(b, a)
