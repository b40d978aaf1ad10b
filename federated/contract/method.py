"""The contract: a federated method is one class whose hooks are listed in the order data meets them.

Override the two or three hooks that a paper changes and leave the rest. [server] runs on the coordinator,
[client] on the device in NumPy, [torch] on the device in torch, [both] on either side and must agree.
Each side has a private `ctx.state`, saved after every round; nothing else survives between rounds.
What crosses goes through `ctx.down` and `ctx.up`; the class is frozen, so nothing crosses by accident.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import msgspec

from .contexts import Arrival, Ask, ClientContext, Member, ServerContext, StepContext, Tensor, Torch
from .places import Places
from .spec import Spec

if TYPE_CHECKING:
    from .tensors import Array, Tensors
    from .update import LowRank, Update

    Change = Mapping[str, Array | LowRank]


class Method(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Base class: every hook does nothing. Fields are hyper-parameters with range and help in
    `Annotated[…, Meta]`."""

    space: ClassVar[str] = "any"
    """`factors` where A and B must keep their coordinates, `product` where they are renewed every round,
    `any` where it is all the same."""
    evidence: ClassVar[str] = "toy-checked"
    use_when: ClassVar[str] = ""
    releases: ClassVar[bool] = False
    """True for a privacy method: after its `send`, no later `send` may read data or state."""
    needs_all: ClassVar[bool] = False
    """True where hooks go over single updates several times: they are kept decoded, and a stack that
    leaves nothing but sums is refused."""
    codes: ClassVar[Literal["", "tensors", "floats"]] = ""
    """For a codec, what it takes: the adapter's `tensors` by name, or any `floats`. What it sends are no
    tensors of the adapter any more, so behind it come only codecs of floats, and releases."""
    sums: ClassVar[bool] = False
    """True where the coordinator sees nothing but sums: excludes whatever looks at or undoes single
    updates."""
    tells: ClassVar[Literal["", "public", "private"]] = ""
    """For what travels beside the update (`ctx.up`): `private` where it is made of examples, so that no
    release may be in the stack; `public` where it is not. A method with `arrived`, `trained` or `answer`
    that does not say counts as private."""
    timed: ClassVar[bool] = False
    """True where the result depends on who arrives when: tests compare less."""
    example: ClassVar[Mapping[str, Any]] = {}
    """Settings for tests and documents where the defaults do not show what the method does."""
    plain: ClassVar[bool] = False
    """True where the gradient is the step: the job's loop is SGD, neither clipped nor warmed up. A job
    that says `adamw` is refused."""
    legs: ClassVar[tuple[str, ...]] = ("train",)
    """Parts of a round: each is asked of the same devices and survives kills like a round; in `train`
    updates are made."""

    # the adapter
    def tensors(self, spec: Spec, ctx: ServerContext) -> "dict[str, Tensor]":
        """[server] Tensors that the adapter has beside its factors, by name, with their first values.

        A function of settings, `spec` (every map that the job may adapt) and `ctx.rng`: it is asked again
        after a restart.
        """
        return {}

    def express(self, params: Mapping[str, Any], spec: Spec, xp: Any) -> dict[str, Any]:
        """[both] What the model computes with, made of what is trained: factors `<module>.A` (rank, in)
        and `.B` (out, rank), heads.

        `params` are all tensors of the adapter, after methods before this one; `xp` is torch (gradients go
        through) or NumPy (published and exported adapters). A function of its arguments alone: no
        randomness, no state. Names that it does not give stay as they are.
        """
        return {}

    # down
    def select(self, devices: Sequence[Member], ctx: ServerContext) -> Sequence[Member]:
        """[server] Which devices take part in this round: some of those given."""
        return devices

    def plan(self, ask: Ask, device: str, ctx: ServerContext) -> Ask:
        """[server] Change what one device is asked to do."""
        return ask

    def offer(self, adapter: "Tensors", device: str, ctx: ServerContext) -> "Tensors":
        """[server] The adapter that one device receives (compact); `ctx.down` carries extra tensors. What
        is left out it does not hold."""
        return adapter

    # which tensors
    def trains(self, name: str, ctx: ClientContext) -> bool:
        """[client] Is this tensor trained here in this round? Asked several times: a function of its
        arguments that writes no state."""
        return True

    def travels(self, name: str, ctx: ClientContext) -> bool:
        """[client] Does this tensor leave the device in this round? Asked several times, like `trains`.

        While it does not, a round starts from what was last trained here; once it travels again, from what
        arrives.
        """
        return True

    # on the device
    def attach(self, model: Places, spec: Spec, ctx: "StepContext | None") -> None:
        """[torch] Put functions into the model, at the places that `model` has; once a round, the engine
        takes them out after it.

        `ctx` is None where a published adapter is used (`edge-agent infer`): all that functions read then
        are heads and added tensors.
        """

    def data(self, examples: "list[dict[str, Any]]", ctx: StepContext) -> "list[dict[str, Any]]":
        """[torch] The examples that this round trains on. Give a new list; examples are kept between
        rounds, so do not change them."""
        return examples

    def arrived(self, params: Mapping[str, Torch], ctx: StepContext) -> "Tensors":
        """[torch] Look at the adapter as it arrived (the tensors that are trained here); NumPy, travels
        beside the update like `ctx.up`."""
        return {}

    def trained(self, params: Mapping[str, Torch], ctx: StepContext) -> "Tensors":
        """[torch] Look at the adapter as it was trained here; NumPy, travels beside the update like
        `ctx.up`."""
        return {}

    def begin(self, adapter: "Tensors", ctx: ClientContext) -> "Tensors":
        """[client] Where training starts, from what arrived: the same names and shapes."""
        return adapter

    def batch(self, batch: dict[str, Torch], ctx: StepContext) -> dict[str, Torch]:
        """[torch] Change a batch before it is used."""
        return batch

    def objective(self, params: Mapping[str, Torch], batch: dict[str, Torch], ctx: StepContext) -> Torch:
        """[torch] Replace the task's loss: a scalar."""
        raise NotImplementedError

    def train(self, start: dict[str, Torch], ctx: StepContext) -> dict[str, Torch]:
        """[torch] Replace the whole local loop: tensors of `start` as they were trained; names that are
        left out did not move."""
        raise NotImplementedError

    def gradient(
        self, params: Mapping[str, Torch], batch: dict[str, Torch], ctx: StepContext
    ) -> tuple[float, dict[str, Torch]]:
        """[torch] Value and gradient of a batch for one step, all of `params`: from `ctx.gradient` at as
        many points as it takes."""
        raise NotImplementedError

    def loss(
        self, loss: Torch, params: Mapping[str, Torch], batch: dict[str, Torch], ctx: StepContext
    ) -> Torch:
        """[torch] Change the training loss."""
        return loss

    def grad(self, grad: dict[str, Torch], params: Mapping[str, Torch], ctx: StepContext) -> dict[str, Torch]:
        """[torch] Change the gradient before it is clipped and the optimiser sees it; every name that came
        in."""
        return grad

    def serve(self, adapter: "Tensors", ctx: ClientContext) -> "Tensors":
        """[client] The adapter that the device uses between rounds."""
        return adapter

    # up
    def send(self, delta: "Tensors", ctx: ClientContext) -> "Tensors":
        """[client] Change what leaves the device; `ctx.up` carries extra tensors."""
        return delta

    def wire_bits(self, numbers: float, bits: float) -> float:
        """[server] Bits that `send` makes of `numbers` numbers of `bits` bits in all: what an upload is
        expected to cost."""
        return bits

    def receive(self, delta: "Tensors", update: "Update", ctx: ServerContext) -> "Tensors":
        """[server] Undo `send` for one update; runs in the reverse order of `send`.

        It may run more than once for an update: what it keeps in `ctx.state` must be the same after the
        second time.
        """
        return delta

    def ready(
        self, arrived: Sequence[Arrival], out: Sequence[str], elapsed: float, ctx: ServerContext
    ) -> bool:
        """[server] May the round close, `elapsed` seconds after it was opened? `out`: devices that have
        not answered. Writes no state."""
        return not out

    def weigh(self, update: "Update", ctx: ServerContext) -> "Update | None":
        """[server] Reweigh, scale or (None) drop one update, seen alone, in device order: nothing is kept
        in memory for it."""
        return update

    def admit(self, updates: "list[Update]", ctx: ServerContext) -> "list[Update]":
        """[server] Drop, clip or reweigh updates, seen together."""
        return updates

    def reduce(self, updates: "Sequence[Update]", ctx: ServerContext) -> "Change":
        """[server] Many updates to one change of the global adapter, by map (`LowRank`) or tensor name
        (array)."""
        raise NotImplementedError

    def step(self, change: "Change", ctx: ServerContext) -> "Change":
        """[server] Change the aggregate before it is applied. What is left out does not move."""
        return change

    # a round of several legs
    def ask(self, device: str, ctx: ServerContext) -> "Tensors | None":
        """[server] What a device is asked in a leg other than `train` (`ctx.round.leg`); None: nothing."""
        return None

    def answer(self, question: "Tensors", ctx: StepContext) -> "Tensors":
        """[torch] The answer to what `ask` asked, NumPy; in a leg other than `train`, in which nothing is
        evaluated or trained."""
        return {}

    def hear(self, answers: "Mapping[str, Tensors]", ctx: ServerContext) -> "Change":
        """[server] All answers of a leg by device, in their order, without late ones; what they change of
        the adapter, before `step`."""
        return {}


EXCLUSIVE = ("objective", "train", "gradient", "ready", "reduce", "ask")
"""Hooks that one method of a stack may define."""
HOOKS = tuple(n for n, v in vars(Method).items() if callable(v) and not n.startswith("_"))


def overrides(method: Method, hook: str) -> bool:
    """Does this method's class define `hook` itself?"""
    return getattr(type(method), hook) is not getattr(Method, hook)
