"""A list of methods, run as one. Knows the order of hooks and nothing about any method."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from ..errors import BadMethod, Conflict
from .method import EXCLUSIVE, HOOKS, ClientContext, Method, Round, ServerContext, overrides
from .spec import Spec, coordinates
from .tensors import Array, Tensors
from .update import LowRank, Update

Change = dict[str, Array | LowRank]


def seed_of(*words: object) -> int:
    """A 64-bit seed from words such as (job, round, device, method); the same everywhere."""
    text = "\0".join(str(w) for w in words)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


class Stack:
    """Methods in the order given. Raises Conflict where two of them exclude each other."""

    def __init__(self, methods: Mapping[str, Method], space: str = "") -> None:
        self.methods = dict(methods)
        self._using = {h: [(n, m) for n, m in self.methods.items() if overrides(m, h)] for h in HOOKS}
        self.space = space or self._space()
        self._check()

    def _space(self) -> str:
        wanted = {m.space: n for n, m in reversed(self.methods.items()) if m.space != "any"}
        if len(wanted) > 1:
            raise Conflict(
                f"`{wanted['factors']}` needs factors that keep their coordinates, `{wanted['product']}` needs them renewed every round",
                "keep one of the two",
            )
        return next(iter(wanted), "product")

    def _check(self) -> None:
        for hook in EXCLUSIVE:
            users = [n for n, _ in self._using[hook]]
            if len(users) > 1:
                raise Conflict(f"`{users[0]}` and `{users[1]}` both define `{hook}`", "keep one of the two")
        if self._using["train"] and self._using["objective"]:
            raise Conflict(
                f"`{self._using['train'][0][0]}` replaces the loop in which `{self._using['objective'][0][0]}` would set the loss",
                "keep one of the two",
            )
        released = ""
        for name, method in self.methods.items():
            if released and overrides(method, "send") and not method.releases:
                raise Conflict(
                    f"`{name}` changes what leaves the device after `{released}` has made it private", f"put `{name}` before `{released}`"
                )
            released = name if method.releases else released

    def using(self, hook: str) -> list[tuple[str, Method]]:
        """The methods that define a hook, in order."""
        return self._using[hook]

    def trains(self, name: str, round: Round) -> bool:
        """Do all methods agree that this tensor is trained?"""
        return all(m.trains(name, round) for _, m in self.using("trains"))

    def travels(self, name: str, round: Round) -> bool:
        """Is this tensor trained and does it leave the device?"""
        return self.trains(name, round) and all(m.travels(name, round) for _, m in self.using("travels"))


class ServerSide:
    """The coordinator's side of a stack. `state` is saved by the caller after every round."""

    def __init__(self, stack: Stack, job: str, total: int, state: dict[str, dict[str, Any]] | None = None) -> None:
        self.stack, self.job, self.total = stack, job, total
        self.state: dict[str, dict[str, Any]] = {n: (state or {}).get(n, {}) for n in stack.methods}
        self.fleet = 0
        self.emptied = ""
        """The method that selected nobody, if one did."""
        self.left_out: dict[tuple[str, int], str] = {}
        """(device, age) of every update that was not admitted → the method that dropped it."""

    def context(self, name: str, number: int, device: str = "") -> ServerContext:
        """The context of one method in one round; its generator depends on nothing else."""
        rng = np.random.default_rng(seed_of(self.job, number, device, name, "server"))
        return ServerContext(Round(number, self.total), self.state.setdefault(name, {}), rng, self.fleet, self.stack.space)

    def select(self, devices: Sequence[str], number: int) -> list[str]:
        """Who takes part. Empty where a method selects nobody, which `emptied` then names. Raises BadMethod for strangers."""
        self.emptied = ""
        for n, m in self.stack.using("select"):
            chosen = m.select(devices, self.context(n, number))
            if strange := sorted(set(chosen) - set(devices)):
                raise BadMethod(f"`{n}` selects `{strange[0]}`, which is not among the devices that it was given")
            if devices and not chosen:
                self.emptied = n
            devices = chosen
        return list(devices)

    def plan(self, job: dict[str, Any], device: str, number: int) -> dict[str, Any]:
        """One device's assignment, adjusted by every method."""
        for n, m in self.stack.using("plan"):
            job = m.plan(job, device, self.context(n, number, device))
        return job

    def offer(self, adapter: Tensors, device: str, number: int) -> tuple[Tensors, dict[str, Tensors]]:
        """What one device receives: its view and the extra tensors by method."""
        extra: dict[str, Tensors] = {}
        for n, m in self.stack.using("offer"):
            ctx = self.context(n, number, device)
            adapter = m.offer(adapter, device, ctx)
            if ctx.down:
                extra[n] = ctx.down
        return adapter, extra

    def ready(self, arrived: int, invited: int, number: int) -> bool | None:
        """What the stack says about closing; None where no method decides."""
        users = self.stack.using("ready")
        return users[0][1].ready(arrived, invited, self.context(users[0][0], number)) if users else None

    def receive(self, update: Update, number: int) -> Update:
        """Decode one update: `send` undone in reverse order."""
        delta = dict(update.delta)
        for n, m in reversed(self.stack.using("receive")):
            delta = m.receive(delta, update, self.context(n, number, update.device))
        return replace(update, delta=delta)

    def admit(self, updates: list[Update], number: int) -> list[Update]:
        """Drop, clip and reweigh; `left_out` then says which method dropped whose update. Raises BadMethod for strangers."""
        self.left_out = {}
        for n, m in self.stack.using("admit"):
            given = {(u.device, u.age) for u in updates}
            admitted = m.admit(updates, self.context(n, number))
            kept = {(u.device, u.age) for u in admitted}
            if len(kept) < len(admitted) or not kept <= given:
                strange = next((u.device for u in admitted if (u.device, u.age) not in given), "one of them twice")
                raise BadMethod(f"`{n}` admits an update that it was not given: {strange}")
            self.left_out |= dict.fromkeys(given - kept, n)
            updates = admitted
        return updates

    def reduce(self, updates: list[Update], number: int) -> Change | None:
        """The stack's own aggregate; None where the engine's default applies."""
        users = self.stack.using("reduce")
        return users[0][1].reduce(updates, self.context(users[0][0], number)) if users else None

    def step(self, change: Change, number: int) -> Change:
        """The aggregate after every method's server step."""
        for n, m in self.stack.using("step"):
            change = m.step(change, self.context(n, number))
        return change


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
        self._contexts: dict[str, ClientContext] = {}
        self.kept: Tensors = dict(kept.get("\0kept", {}))

    def keep(self, tensors: Tensors) -> None:
        """Remember tensors that are trained here and never leave; the next round starts from them."""
        self.kept = {**self.kept, **tensors}

    def _made(self, name: str, anchor: Tensors) -> ClientContext:
        rng = np.random.default_rng(seed_of(self._job, self.round.number, self.device, name))
        return ClientContext(
            self.round,
            self.device,
            self.spec,
            anchor,
            self.state[name],
            rng,
            dict(self._down.get(name, {})),
            self.up[name],
            self._steps,
            self._lr,
        )

    def context(self, name: str) -> ClientContext:
        """The context of one method; `begin` must have run."""
        return self._contexts[name]

    def begin(self, anchor: Tensors) -> Tensors:
        """The starting point, from the adapter as received (with what this device keeps for itself)."""
        self._contexts = {n: self._made(n, anchor) for n in self.stack.methods}
        start = anchor
        for n, m in self.stack.using("begin"):
            start = m.begin(start, self._contexts[n])
        return start

    def send(self, delta: Tensors) -> Tensors:
        """What leaves the device."""
        delta = {k: t for k, t in delta.items() if self.stack.travels(k, self.round)}
        for n, m in self.stack.using("send"):
            delta = m.send(delta, self._contexts[n])
        return delta

    def serve(self, adapter: Tensors) -> Tensors:
        """The adapter used between rounds."""
        for n, m in self.stack.using("serve"):
            adapter = m.serve(adapter, self._contexts[n])
        return adapter

    def saved(self) -> dict[str, Any]:
        """State to keep, with the coordinates that it lives in: also those of layers that this round left alone, whose state
        waits for them and must not outlive their next change."""
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
