"""A list of methods, run as one. Knows the order of hooks and nothing about any method."""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Protocol

import numpy as np

from ..errors import Conflict, HookError
from .hook_errors import check_state, check_tensors
from .method import EXCLUSIVE, HOOKS, Adapter, Arrival, Ask, ClientContext, Member, Method, Round, ServerContext, Tensor, overrides
from .spec import Spec, coordinates, module_of
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
        self.plain = any(m.plain for m in self.methods.values())
        self._check()
        self.legs: tuple[str, ...] = next((m.legs for m in self.methods.values() if len(m.legs) > 1), ("train",))
        """Parts of a round; to the engine each is a round of its own."""

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
        self._check_codecs()
        self._check_sums()
        self._check_release()

    def _check_codecs(self) -> None:
        coded = ""
        for name, method in self.methods.items():
            if coded and overrides(method, "send") and method.codes != "floats" and not method.releases:
                raise Conflict(f"`{name}` reads tensors that `{coded}` has coded", f"put `{name}` before `{coded}`, or keep one of the two")
            coded = name if method.codes else coded

    def _check_sums(self) -> None:
        if not (summing := next((n for n, m in self.methods.items() if m.sums), "")):
            return
        for name, method in self.methods.items():
            single = next((h for h in ("weigh", "admit", "receive") if overrides(method, h)), "")
            if name != summing and (method.needs_all or single):
                raise Conflict(f"`{name}` looks at single updates, of which `{summing}` leaves nothing but the sum", "keep one of the two")

    def _check_release(self) -> None:
        released = ""
        for name, method in self.methods.items():
            if released and overrides(method, "send") and not method.releases:
                raise Conflict(
                    f"`{name}` changes what leaves the device after `{released}` has made it private", f"put `{name}` before `{released}`"
                )
            released = name if method.releases else released
        telling = next((n for n, m in self.methods.items() if _tells(m)), "")
        if released and telling:
            raise Conflict(
                f"`{telling}` tells what it makes of examples beside the update that `{released}` has made private", "keep one of the two"
            )

    @property
    def releases(self) -> bool:
        """Is what leaves a device made private? Then its report says nothing of training examples either."""
        return any(m.releases for m in self.methods.values())

    @property
    def needs_all(self) -> bool:
        """Are single updates looked at several times?"""
        return any(m.needs_all for m in self.methods.values())

    def wire_bits(self, numbers: float) -> float:
        """Bits that an upload of so many numbers is expected to take, through all codecs in their order."""
        bits = 32.0 * numbers
        for _, m in self.using("wire_bits"):
            bits = m.wire_bits(numbers, bits)
        return bits

    def using(self, hook: str) -> list[tuple[str, Method]]:
        """The methods that define a hook, in order."""
        return self._using[hook]

    def at(self, number: int, total: int) -> Round:
        """The round that the engine counts as `number`: with several legs, each is one to the engine."""
        n = len(self.legs)
        return Round(number // n, -(-total // n), self.legs[number % n])

    def express(self, params: Mapping[str, Any], spec: Spec, xp: Any) -> dict[str, Any]:
        """What the model computes with: `params`, and what methods make of them, in the order of the stack."""
        full = dict(params)
        for _, m in self.using("express"):
            full.update(m.express(full, spec, xp))
        return full


def _tells(method: Method) -> bool:
    """May what travels beside the update be made of examples? Where a method looks at the model and does not say, it may."""
    looks = any(overrides(method, hook) for hook in ("arrived", "trained", "answer"))
    return method.tells == "private" or (looks and not method.tells)


class DeviceMemory(Protocol):
    """Where methods' memory of single devices lies."""

    def of(self, method: str, device: str) -> dict[str, Any]:
        """What a method knows of a device."""


class ServerSide:
    """The coordinator's side of a stack. `state` is saved by the caller after every round, `devices` with the version.

    `adapter`, `mean`, `updates` and `carry` are what hooks see in their contexts; whoever closes a round sets them.
    """

    def __init__(self, stack: Stack, job: str, total: int, state: dict[str, dict[str, Any]] | None = None) -> None:
        self.stack, self.job, self.total = stack, job, total
        self.state: dict[str, dict[str, Any]] = {n: (state or {}).get(n, {}) for n in stack.methods}
        self.enrolled = 0
        self.adapter = Adapter({}, {})
        self.mean: Callable[[Sequence[Update]], Change] | None = None
        self.maps: Mapping[str, Any] = {}
        self.carry: dict[str, LowRank] = {}
        self.devices: DeviceMemory | None = None
        self.updates: Sequence[Update] = ()
        self.emptied = ""
        """The method that selected nobody, if one did."""
        self.left_out: dict[tuple[str, int], str] = {}
        """(device, age) of every update that no version takes → the method that dropped it."""

    def leg(self, number: int) -> str:
        """Which part of a round the engine's round `number` is."""
        return self.stack.at(number, self.total).leg

    def context(self, name: str, number: int, device: str = "") -> ServerContext:
        """The context of one method in one round; its generator depends on nothing else."""
        rng = np.random.default_rng(seed_of(self.job, number, device, name, "server"))
        ctx = ServerContext(
            self.stack.at(number, self.total), self.state.setdefault(name, {}), rng, self.enrolled, self.stack.space,
            adapter=self.adapter, updates=self.updates, maps=self.maps, carry=self.carry,
        )  # fmt: skip
        if self.mean is not None:
            ctx.mean = self.mean
        if self.devices is not None:
            ctx.of = partial(self.devices.of, name)
        return ctx

    def select(self, devices: Sequence[Member], number: int) -> list[str]:
        """Who takes part, by name. Empty where a method selects nobody, which `emptied` then names. Raises HookError."""
        self.emptied = ""
        for n, m in self.stack.using("select"):
            chosen = list(m.select(devices, self.context(n, number)))
            if strange := sorted({d.device for d in chosen} - {d.device for d in devices}):
                raise HookError(n, "select", f"selects `{strange[0]}`, which is not among the devices that it was given")
            if devices and not chosen:
                self.emptied = n
            devices = chosen
        return [d.device for d in devices]

    def plan(self, ask: Ask, device: str, number: int) -> Ask:
        """What one device is asked to do, changed by every method. Raises HookError."""
        for n, m in self.stack.using("plan"):
            ranks = ask["placement"]
            ask = m.plan({**ask, "placement": dict(ranks)}, device, self.context(n, number, device))
            if strange := [k for k, r in ask["placement"].items() if k not in ranks or not 0 <= r <= ranks[k]]:
                raise HookError(n, "plan", f"gives `{strange[0]}` rank {ask['placement'][strange[0]]}, at most {ranks.get(strange[0], 0)}")
            if ask["steps"] < 0 or ask["rank"] < 0 or ask["lr"] < 0:
                raise HookError(n, "plan", f"asks for rank {ask['rank']}, {ask['steps']} steps, rate {ask['lr']}", "none is below 0")
        return ask

    def offer(self, adapter: Tensors, device: str, number: int) -> tuple[Tensors, dict[str, Tensors]]:
        """What one device receives: its view and the extra tensors by method. Raises HookError."""
        extra: dict[str, Tensors] = {}
        for n, m in self.stack.using("offer"):
            ctx = self.context(n, number, device)
            offered = m.offer(adapter, device, ctx)
            check_tensors(n, "offer", offered, adapter)
            check_tensors(n, "offer", ctx.down)
            adapter = offered
            if ctx.down:
                extra[n] = ctx.down
        return adapter, extra

    def ready(self, arrived: Sequence[Arrival], out: Sequence[str], elapsed: float, number: int) -> bool | None:
        """What the stack says about closing; None where no method decides."""
        users = self.stack.using("ready")
        return users[0][1].ready(arrived, out, elapsed, self.context(users[0][0], number)) if users else None

    def ask(self, device: str, number: int) -> dict[str, Tensors]:
        """What a device is asked in this leg, by method; nothing in the leg in which it trains."""
        if self.leg(number) == "train":
            return {}
        asked = {n: m.ask(device, self.context(n, number, device)) for n, m in self.stack.using("ask")}
        for n, question in asked.items():
            if question is not None:
                check_tensors(n, "ask", question)
        return {n: a for n, a in asked.items() if a is not None}

    def hear(self, answers: Mapping[str, Mapping[str, Tensors]], number: int) -> Change:
        """All answers of a leg (device → method → tensors), and what they change."""
        change: Change = {}
        for n, m in self.stack.using("hear"):
            change.update(m.hear({d: a[n] for d, a in sorted(answers.items()) if n in a}, self.context(n, number)))
            self._check(n, "hear", change)
        return change

    def receive(self, update: Update, number: int) -> Update:
        """Decode one update: `send` undone in reverse order."""
        delta = dict(update.sent)
        for n, m in reversed(self.stack.using("receive")):
            delta = m.receive(delta, update, self.context(n, number, update.device))
        return replace(update, sent=delta)

    def weigh(self, updates: Iterable[Update], number: int) -> Iterator[Update]:
        """Updates one after the other, reweighed; without those that a method drops."""
        users = self.stack.using("weigh")
        for update in updates:
            weighed = update
            for n, m in users:
                answer = m.weigh(weighed, self.context(n, number, update.device))
                if answer is None:
                    self.left_out[update.device, update.age] = n
                    break
                weighed = answer
            else:
                yield weighed

    def admit(self, updates: list[Update], number: int) -> list[Update]:
        """Drop, clip and reweigh; `left_out` then says which method dropped whose update. Raises HookError for strangers."""
        for n, m in self.stack.using("admit"):
            given = {(u.device, u.age) for u in updates}
            admitted = m.admit(updates, self.context(n, number))
            check_state(n, "admit", self.state[n])
            kept = {(u.device, u.age) for u in admitted}
            if len(kept) < len(admitted) or not kept <= given:
                strange = next((u.device for u in admitted if (u.device, u.age) not in given), "one of them twice")
                raise HookError(n, "admit", f"admits an update that it was not given: {strange}")
            self.left_out |= dict.fromkeys(given - kept, n)
            updates = admitted
        return updates

    def reduce(self, updates: Sequence[Update], number: int) -> Change | None:
        """The stack's own aggregate; None where the engine's default applies. Raises HookError."""
        for n, m in self.stack.using("reduce"):
            change = dict(m.reduce(updates, self.context(n, number)))
            self._check(n, "reduce", change)
            return change
        return None

    def tensors(self, spec: Spec) -> dict[str, Tensor]:
        """What methods add to the adapter. Raises Conflict where two add the same name, or one adds a factor's or a head's."""
        added: dict[str, Tensor] = {}
        for n, m in self.stack.using("tensors"):
            mine = m.tensors(spec, self.context(n, 0))
            check_tensors(n, "tensors", {k: t.value for k, t in mine.items()})
            if twice := sorted(k for k in mine if k in added or k in self.adapter.dense or module_of(k) in spec.pairs):
                raise Conflict(f"`{n}` adds `{twice[0]}`, which is there already", "keep one of the two")
            added.update(mine)
        return added

    def step(self, change: Change, number: int) -> Change:
        """The aggregate after every method's server step. Raises HookError."""
        for n, m in self.stack.using("step"):
            change = dict(m.step(change, self.context(n, number)))
            self._check(n, "step", change)
        return change

    def _check(self, name: str, hook: str, change: Change) -> None:
        """Is this a change of the adapter that can be applied, and a state that can be saved? Raises HookError."""
        check_state(name, hook, self.state[name])
        pairs, dense = self.adapter.pairs, self.adapter.dense
        if not pairs and not dense:
            return
        for key, value in change.items():
            parts = {f"{key}.B": value.B, f"{key}.A": value.A} if isinstance(value, LowRank) else {key: value}
            check_tensors(name, hook, parts)
            if isinstance(value, LowRank):
                like = pairs.get(key)
                fits = like is not None and (len(value.B), value.A.shape[1]) == (len(like.B), like.A.shape[1])
            elif key in dense:
                fits = value.shape == dense[key].shape
            else:
                like = pairs.get(module_of(key))
                fits = like is not None and key != module_of(key) and _slots_fit(value, like.B if key.endswith(".B") else like.A, key)
            if not fits:
                shape = (value.B.shape, value.A.shape) if isinstance(value, LowRank) else value.shape
                raise HookError(name, hook, f"changes `{key}` by shape {shape}, which the adapter does not have", "see `ctx.adapter`")


def _slots_fit(change: Array, factor: Array, name: str) -> bool:
    """A factor's change may leave out its last slots."""
    slots = 1 if name.endswith(".B") else 0
    other = 1 - slots
    return change.ndim == 2 and change.shape[other] == factor.shape[other] and change.shape[slots] <= factor.shape[slots]


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
            self.round, self.device, self.spec, {}, self.state[name], rng, down, self.up[name], self._steps, self._lr
        )  # fmt: skip

    def context(self, name: str) -> ClientContext:
        """The context of one method; `begin` must have run."""
        return self._contexts[name]

    def trains(self, name: str) -> bool:
        """Is this tensor trained here in this round? Constants never are."""
        dense = self.spec.dense.get(name)
        return (dense is None or dense.trained) and all(m.trains(name, self._contexts[n]) for n, m in self.stack.using("trains"))

    def stays(self, name: str) -> bool:
        """Does a method keep this tensor on the device in this round, whether it is trained or not?"""
        return not all(m.travels(name, self._contexts[n]) for n, m in self.stack.using("travels"))

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
        return {k: t for k, t in self.kept.items() if k in shapes and t.shape == tuple(shapes[k]) and self.stays(k)}

    def begin(self, received: Tensors) -> Tensors:
        """Where training starts, from the adapter as received (with what this device keeps for itself). Raises HookError."""
        start = received
        for ctx in self._contexts.values():
            ctx.received = received
        for n, m in self.stack.using("begin"):
            start = m.begin(start, self._contexts[n])
            check_tensors(n, "begin", start, received, whole=True)
            check_state(n, "begin", self.state[n])
        for ctx in self._contexts.values():
            ctx.start = start
        return start

    def send(self, delta: Tensors) -> Tensors:
        """What leaves the device. Raises HookError."""
        delta = {k: t for k, t in delta.items() if self.travels(k)}
        for n, m in self.stack.using("send"):
            delta = m.send(delta, self._contexts[n])
            check_tensors(n, "send", delta)
            check_tensors(n, "send", self.up[n])
            check_state(n, "send", self.state[n])
        return delta

    def serve(self, adapter: Tensors) -> Tensors:
        """The adapter used between rounds. Raises HookError."""
        for n, m in self.stack.using("serve"):
            served = m.serve(adapter, self._contexts[n])
            check_tensors(n, "serve", served, adapter, whole=True)
            check_state(n, "serve", self.state[n])
            adapter = served
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
