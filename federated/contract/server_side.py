"""The coordinator's side of a stack: every server hook of every method, in order, checked."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Protocol

import numpy as np

from ..errors import Conflict, HookError
from .contexts import Adapter, Arrival, Ask, Member, ServerContext, Tensor
from .hook_errors import check_mapping, check_state, check_tensors, run_hook
from .spec import Spec, module_of
from .stack import Change, Stack, seed_of
from .tensors import Array, Tensors
from .update import LowRank, Update


class DeviceMemory(Protocol):
    """Where methods' memory of single devices lies."""

    def of(self, method: str, device: str) -> dict[str, Any]:
        """What a method knows of a device."""


class ServerSide:
    """The coordinator's side of a stack. `state` is saved by the caller after every round, `devices` with
    the version.

    `adapter`, `mean`, `updates` and `carry` are what hooks see in their contexts; whoever closes a round
    sets them.
    """

    def __init__(
        self, stack: Stack, job: str, total: int, state: dict[str, dict[str, Any]] | None = None
    ) -> None:
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
            self.stack.at(number, self.total), self.state.setdefault(name, {}), rng, self.enrolled,
            self.stack.space,
            adapter=self.adapter, updates=self.updates, maps=self.maps, carry=self.carry,
        )  # fmt: skip
        if self.mean is not None:
            ctx.mean = self.mean
        if self.devices is not None:
            ctx.of = partial(self.devices.of, name)
        return ctx

    def select(self, devices: Sequence[Member], number: int) -> list[str]:
        """Who takes part, by name. Empty where a method selects nobody, which `emptied` then names. Raises
        HookError."""
        self.emptied = ""
        for n, m in self.stack.using("select"):
            chosen = list(run_hook(n, m, "select", devices, self.context(n, number)))
            if strange := sorted({d.device for d in chosen} - {d.device for d in devices}):
                raise HookError(
                    n, "select", f"selects `{strange[0]}`, which is not among the devices that it was given"
                )
            if devices and not chosen:
                self.emptied = n
            devices = chosen
        return [d.device for d in devices]

    def plan(self, ask: Ask, device: str, number: int) -> Ask:
        """What one device is asked to do, changed by every method. Raises HookError."""
        for n, m in self.stack.using("plan"):
            ranks = ask["placement"]
            ask = run_hook(
                n, m, "plan", {**ask, "placement": dict(ranks)}, device, self.context(n, number, device)
            )
            if missing := sorted(set(Ask.__annotations__) - set(check_mapping(n, "plan", ask))):
                raise HookError(n, "plan", f"leaves out `{missing[0]}`", "return {**ask, what changes}")
            check_state(n, "plan", self.state[n])
            if strange := [
                k for k, r in ask["placement"].items() if k not in ranks or not 0 <= r <= ranks[k]
            ]:
                raise HookError(
                    n,
                    "plan",
                    f"gives `{strange[0]}` rank {ask['placement'][strange[0]]}, at most "
                    f"{ranks.get(strange[0], 0)}",
                )
            if ask["steps"] < 0 or ask["rank"] < 0 or ask["lr"] < 0:
                raise HookError(
                    n,
                    "plan",
                    f"asks for rank {ask['rank']}, {ask['steps']} steps, rate {ask['lr']}",
                    "none is below 0",
                )
        return ask

    def offer(self, adapter: Tensors, device: str, number: int) -> tuple[Tensors, dict[str, Tensors]]:
        """What one device receives: its view and the extra tensors by method. Raises HookError."""
        extra: dict[str, Tensors] = {}
        for n, m in self.stack.using("offer"):
            ctx = self.context(n, number, device)
            offered = run_hook(n, m, "offer", adapter, device, ctx)
            check_tensors(n, "offer", offered, adapter)
            check_tensors(n, "offer", ctx.down)
            check_state(n, "offer", self.state[n])
            adapter = offered
            if ctx.down:
                extra[n] = ctx.down
        return adapter, extra

    def ready(
        self, arrived: Sequence[Arrival], out: Sequence[str], elapsed: float, number: int
    ) -> bool | None:
        """What the stack says about closing; None where no method decides."""
        users = self.stack.using("ready")
        if not users:
            return None
        (n, m), *_ = users
        return bool(run_hook(n, m, "ready", arrived, out, elapsed, self.context(n, number)))

    def ask(self, device: str, number: int) -> dict[str, Tensors]:
        """What a device is asked in this leg, by method; nothing in the leg in which it trains."""
        if self.leg(number) == "train":
            return {}
        asked = {
            n: run_hook(n, m, "ask", device, self.context(n, number, device))
            for n, m in self.stack.using("ask")
        }
        for n, question in asked.items():
            if question is not None:
                check_tensors(n, "ask", question)
        return {n: a for n, a in asked.items() if a is not None}

    def hear(self, answers: Mapping[str, Mapping[str, Tensors]], number: int) -> Change:
        """All answers of a leg (device → method → tensors), and what they change."""
        change: Change = {}
        for n, m in self.stack.using("hear"):
            heard = {d: a[n] for d, a in sorted(answers.items()) if n in a}
            change.update(check_mapping(n, "hear", run_hook(n, m, "hear", heard, self.context(n, number))))
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
                answer = run_hook(n, m, "weigh", weighed, self.context(n, number, update.device))
                if answer is None:
                    self.left_out[update.device, update.age] = n
                    break
                weighed = answer
            else:
                yield weighed

    def admit(self, updates: list[Update], number: int) -> list[Update]:
        """Drop, clip and reweigh; `left_out` then says which method dropped whose update. Raises HookError
        for strangers."""
        for n, m in self.stack.using("admit"):
            given = {(u.device, u.age) for u in updates}
            admitted = run_hook(n, m, "admit", updates, self.context(n, number))
            check_state(n, "admit", self.state[n])
            kept = {(u.device, u.age) for u in admitted}
            if len(kept) < len(admitted) or not kept <= given:
                strange = next(
                    (u.device for u in admitted if (u.device, u.age) not in given), "one of them twice"
                )
                raise HookError(n, "admit", f"admits an update that it was not given: {strange}")
            self.left_out |= dict.fromkeys(given - kept, n)
            updates = admitted
        return updates

    def reduce(self, updates: Sequence[Update], number: int) -> Change | None:
        """The stack's own aggregate; None where the engine's default applies. Raises HookError."""
        for n, m in self.stack.using("reduce"):
            change = dict(
                check_mapping(n, "reduce", run_hook(n, m, "reduce", updates, self.context(n, number)))
            )
            self._check(n, "reduce", change)
            return change
        return None

    def tensors(self, spec: Spec) -> dict[str, Tensor]:
        """What methods add to the adapter. Raises Conflict where two add the same name, or one adds a
        factor's or a head's."""
        added: dict[str, Tensor] = {}
        for n, m in self.stack.using("tensors"):
            mine = run_hook(n, m, "tensors", spec, self.context(n, 0))
            for key, tensor in check_mapping(n, "tensors", mine).items():
                if not isinstance(tensor, Tensor):
                    kind = type(tensor).__name__
                    raise HookError(n, "tensors", f"gives `{key}` as a {kind}", "wrap it: Tensor(array)")
            check_tensors(n, "tensors", {k: t.value for k, t in mine.items()})
            check_state(n, "tensors", self.state[n])
            if twice := sorted(
                k for k in mine if k in added or k in self.adapter.dense or module_of(k) in spec.pairs
            ):
                raise Conflict(f"`{n}` adds `{twice[0]}`, which is there already", "keep one of the two")
            added.update(mine)
        return added

    def step(self, change: Change, number: int) -> Change:
        """The aggregate after every method's server step. Raises HookError."""
        for n, m in self.stack.using("step"):
            change = dict(check_mapping(n, "step", run_hook(n, m, "step", change, self.context(n, number))))
            self._check(n, "step", change)
        return change

    def _check(self, name: str, hook: str, change: Change) -> None:
        """Is this a change of the adapter that can be applied, and a state that can be saved? Raises
        HookError."""
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
                fits = (
                    like is not None
                    and key != module_of(key)
                    and _slots_fit(value, like.B if key.endswith(".B") else like.A, key)
                )
            if not fits:
                shape = (value.B.shape, value.A.shape) if isinstance(value, LowRank) else value.shape
                raise HookError(
                    name,
                    hook,
                    f"changes `{key}` by shape {shape}, which the adapter does not have",
                    "see `ctx.adapter`",
                )


def _slots_fit(change: Array, factor: Array, name: str) -> bool:
    """A factor's change may leave out its last slots."""
    slots = 1 if name.endswith(".B") else 0
    other = 1 - slots
    return (
        change.ndim == 2
        and change.shape[other] == factor.shape[other]
        and change.shape[slots] <= factor.shape[slots]
    )
