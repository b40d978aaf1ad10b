"""The device's side of a stack, for one round: contexts, what stays here, and the hooks that run in NumPy."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from .contexts import ClientContext, Round
from .hook_errors import check_state, check_tensors, run_hook
from .spec import Spec, coordinates
from .stack import Stack, seed_of
from .tensors import Tensors


class ClientSide:
    """The device's side of a stack, for one round: contexts, and the hooks that run in NumPy."""

    def __init__(
        self,
        stack: Stack,
        job: str,
        round: Round,
        device: str,
        spec: Spec,
        *,
        steps: int,
        lr: float,
        down: Mapping[str, Tensors],
        state: dict[str, Any] | None = None,
    ) -> None:
        self.stack, self.round, self.device, self.spec = stack, round, device, spec
        kept = _still_valid(state or {}, spec)
        self._coordinates = {**(state or {}).get("\0coordinates", {}), **coordinates(spec)}
        self.state: dict[str, dict[str, Any]] = {n: kept.get(n, {}) for n in stack.methods}
        self.up: dict[str, Tensors] = {n: {} for n in stack.methods}
        self._job, self._down, self._steps, self._lr = job, down, steps, lr
        self.kept: Tensors = dict(kept.get("\0kept", {}))
        """What was trained here last, where a method keeps tensors from travelling."""
        self._contexts: dict[str, ClientContext] = {n: self._context(n) for n in stack.methods}

    def _context(self, name: str) -> ClientContext:
        rng = np.random.default_rng(seed_of(self._job, self.round.number, self.device, name))
        down = dict(self._down.get(name, {}))
        return ClientContext(
            self.round, self.device, self.spec, {}, self.state[name], rng, down, self.up[name], self._steps,
            self._lr
        )  # fmt: skip

    def context(self, name: str) -> ClientContext:
        """The context of one method; `begin` must have run."""
        return self._contexts[name]

    def trains(self, name: str) -> bool:
        """Is this tensor trained here in this round? Constants never are."""
        dense = self.spec.dense.get(name)
        return (dense is None or dense.trained) and all(
            run_hook(n, m, "trains", name, self._contexts[n]) for n, m in self.stack.using("trains")
        )

    def stays(self, name: str) -> bool:
        """Does a method keep this tensor on the device in this round, whether it is trained or not?"""
        return not all(
            run_hook(n, m, "travels", name, self._contexts[n]) for n, m in self.stack.using("travels")
        )

    def travels(self, name: str) -> bool:
        """Is this tensor trained and does it leave the device?"""
        return self.trains(name) and not self.stays(name)

    def keep(self, trained: Tensors) -> None:
        """Remember what was trained here. All of it: a tensor that travels now may stay in a later round."""
        if self.stack.using("travels"):
            self.kept = {**self.kept, **trained}

    def own(self) -> Tensors:
        """What stays here in this round, as it was trained last, in this round's shapes."""
        shapes = self.spec.shapes()
        return {
            k: t
            for k, t in self.kept.items()
            if k in shapes and t.shape == tuple(shapes[k]) and self.stays(k)
        }

    def begin(self, received: Tensors) -> Tensors:
        """Where training starts, from the adapter as received (with what this device keeps for itself).
        Raises HookError."""
        start = received
        for ctx in self._contexts.values():
            ctx.received = received
        for n, m in self.stack.using("begin"):
            start = run_hook(n, m, "begin", start, self._contexts[n])
            check_tensors(n, "begin", start, received, whole=True)
            check_state(n, "begin", self.state[n])
        for ctx in self._contexts.values():
            ctx.start = start
        return start

    def send(self, delta: Tensors) -> Tensors:
        """What leaves the device. Raises HookError."""
        delta = {k: t for k, t in delta.items() if self.travels(k)}
        for n, m in self.stack.using("send"):
            delta = run_hook(n, m, "send", delta, self._contexts[n])
            check_tensors(n, "send", delta)
            check_tensors(n, "send", self.up[n])
            check_state(n, "send", self.state[n])
        return delta

    def serve(self, adapter: Tensors) -> Tensors:
        """The adapter used between rounds. Raises HookError."""
        for n, m in self.stack.using("serve"):
            served = run_hook(n, m, "serve", adapter, self._contexts[n])
            check_tensors(n, "serve", served, adapter, whole=True)
            check_state(n, "serve", self.state[n])
            adapter = served
        return adapter

    def saved(self) -> dict[str, Any]:
        """State to keep, with the coordinates that it lives in: also those of layers that this round left
        alone, whose state waits for them and must not outlive their next change."""
        state = {**{n: s for n, s in self.state.items() if s}, "\0kept": self.kept}
        named = _names(state)
        known = {k: c for k, c in self._coordinates.items() if k in named or k in self.spec.shapes()}
        return {**state, "\0coordinates": known}


def _names(tree: Mapping[str, Any]) -> set[str]:
    """Every key at any depth of a state."""
    return set(tree).union(*(_names(v) for v in tree.values() if isinstance(v, dict)))


def _still_valid(state: dict[str, Any], spec: Spec) -> dict[str, Any]:
    """Drop every array that is named like a tensor whose coordinates changed since the state was saved."""
    old, new = state.get("\0coordinates", {}), coordinates(spec)
    gone = {k for k in old if new.get(k, old[k]) != old[k]}

    def keep(tree: dict[str, Any]) -> dict[str, Any]:
        return {k: keep(v) if isinstance(v, dict) else v for k, v in tree.items() if k not in gone}

    return keep({k: v for k, v in state.items() if k != "\0coordinates"})
