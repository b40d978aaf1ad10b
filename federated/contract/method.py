"""The contract: a federated method is one class whose hooks are listed in the order data meets them.

Override the two or three hooks that a paper changes and leave the rest. [server] runs on the coordinator,
[client] on the device in NumPy, [torch] on the device in torch, [both] on either side and must agree.
Each side has a private `ctx.state`, saved after every round; nothing else survives between rounds.
What crosses goes through `ctx.down` and `ctx.up`; the class is frozen, so nothing crosses by accident.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple, TypedDict

import msgspec

from .places import Places
from .spec import Spec

if TYPE_CHECKING:
    import numpy as np

    from .tensors import Array, Tensors
    from .update import LowRank, Update

    Change = Mapping[str, Array | LowRank]

Space = Literal["any", "factors", "product"]
Torch = Any
"""A torch.Tensor. Typed loosely, so that this file needs no torch."""


@dataclass(frozen=True)
class Round:
    """Where the job stands: `number` counts from 0, `total` is the job's length."""

    number: int
    total: int
    leg: str = "train"
    """The part of a round that takes several (`Method.legs`)."""


class Tensor(NamedTuple):
    """A tensor that a method adds to the adapter."""

    value: "Array"
    """Its first value. Floats are kept as fp32, other dtypes as they are."""
    trained: bool = True
    """Is it trained, sent and averaged like a head? Else every device has it, and it moves only when `reduce` or `step` names it."""


class Arrival(NamedTuple):
    """An update of the open round that is there."""

    device: str
    seconds: float
    """From the assignment to the arrival."""
    report: Mapping[str, Any]
    """What the device reports: `steps`, `examples`, `held`, times."""


class Member(NamedTuple):
    """A device that may take part in a round."""

    device: str
    profile: Mapping[str, Any] = {}
    """Its device profile: memory, speed, link, power, by the names of profiles/*.yaml."""
    tags: Mapping[str, str] = {}
    """What its owner says of it, such as `site: lab`."""
    examples: float = 0.0
    """How many it last trained on; 0: not known."""
    busy_s: float = 0.0
    """Seconds since it was given what it has not answered yet; 0: it is free."""
    heard_s: float | None = None
    """Seconds since it was last heard; None: not since the coordinator started."""


class Ask(TypedDict):
    """What one device is asked to do, as `plan` sees and changes it."""

    placement: dict[str, int]
    """Map → rank, at most what the tuner chose; 0: it takes part and has no factors of its own. Maps that are left out arrive frozen."""
    rank: int
    """The largest rank; a smaller one cuts all of `placement`."""
    steps: int
    """Local steps."""
    lr: float
    """Learning rate."""


@dataclass(frozen=True)
class Adapter:
    """The job's adapter as it stands, in canonical coordinates. Devices compute Wx + s·B·A·x + carry."""

    pairs: "Mapping[str, LowRank]"
    """Map → its pair, of the server's rank, without s."""
    dense: "Tensors"
    """Heads and what methods add, by name."""
    carry: "Mapping[str, LowRank]" = field(default_factory=dict)
    """Map → what all devices apply frozen beside the pair, s included."""


def _only_in_a_round(*args: Any) -> Any:
    raise RuntimeError("only the engine can do this, in a round")


@dataclass
class ServerContext:
    """What a server hook may know and do."""

    round: Round
    """Where the job stands."""
    state: dict[str, Any]
    """This method's memory at the coordinator: NumPy arrays, numbers and texts, part of the version."""
    rng: "np.random.Generator"
    """Seeded by job, round, device and method: a round that is closed again draws the same."""
    enrolled: int
    """Devices that may take part in the job."""
    space: str
    """`factors` or `product`: what the aggregate is made of."""
    down: "Tensors" = field(default_factory=dict)
    """For `offer`: extra tensors for the device, in their dtypes."""
    adapter: Adapter = field(default_factory=lambda: Adapter({}, {}))
    """The adapter that the round starts from."""
    updates: "Sequence[Update]" = ()
    """What was admitted, in device order: for `step`, and for a `reduce` that looks again. Decoded when they are looked at."""
    mean: "Callable[[Sequence[Update]], Change]" = _only_in_a_round
    """`mean(updates)`: the engine's own holder-normalised aggregate of any of them, such as a group."""
    maps: Mapping[str, Any] = field(default_factory=dict)
    """Maps that the job may adapt, by name, each with `layer`, `out`, `in_` and `role`."""
    carry: "dict[str, LowRank]" = field(default_factory=dict)
    """For `reduce` and `step`: map → what all devices shall apply frozen from the next version on, s included, beside what they do
    already. Added up by the engine, and cut to the map's own size."""
    of: Callable[[str], dict[str, Any]] = _only_in_a_round
    """`of(device)`: this method's memory of one device, a file of its own, so that a round rewrites those alone that it changed.
    Written by `weigh`, `admit`, `reduce` and `step`, read by all hooks."""


@dataclass
class ClientContext:
    """What a NumPy client hook may know."""

    round: Round
    """Where the job stands."""
    device: str
    """This device's name."""
    spec: Spec
    """What the adapter of this device consists of in this round."""
    received: "Tensors"
    """The tensors that are trained here, as they arrived, compact fp32; what this device keeps for itself is in its place."""
    state: dict[str, Any]
    """This method's memory on this device: NumPy arrays, numbers and texts, saved with every round."""
    rng: "np.random.Generator"
    """Seeded by job, round, device and method: a round that is done again draws the same."""
    down: "Tensors"
    """What this method's `offer` sent along, in its dtypes."""
    up: "Tensors"
    """What travels beside the update; `update.extra_of(self)` at the coordinator."""
    steps: int
    """Local steps of this round."""
    lr: float
    """The job's learning rate."""
    start: "Tensors" = field(default_factory=dict)
    """Where training starts: `received` after every method's `begin`; empty until they have run."""


def _elsewhere(*args: Any, **named: Any) -> Any:
    raise RuntimeError("only the engine on a device can do this")


@dataclass
class StepContext:
    """What a torch hook may know and do.

    A point is a dictionary of tensors by name: leaves, results of other tensors or constants. Names that it leaves out are taken from
    where training stands (inside `fit`: from what `fit` started with), so any part of the adapter may be named, factors as well as heads.
    Functions that look at the model go through what `express` and `attach` of the whole stack make of a point; gradients go through them.
    """

    round: Round
    """Where the job stands."""
    device: str
    """This device's name."""
    received: Mapping[str, Torch]
    """All tensors of the adapter that this device holds, as they arrived (fp32), trained or not; what it keeps for itself in its place."""
    start: Mapping[str, Torch]
    """Where training starts: the tensors that are trained here, after every method's `begin`."""
    down: Mapping[str, Torch]
    """What this method's `offer` sent along, in its dtypes."""
    state: dict[str, Any]
    """This method's memory on this device: NumPy arrays, numbers and texts (no torch tensors), saved with every round."""
    up: "Tensors"
    """What travels beside the update, NumPy; `update.extra_of(self)` at the coordinator."""
    generator: Any
    """A torch.Generator on the CPU, seeded by job, round, device and method."""
    steps: int
    """Local steps of this round."""
    lr: float
    """The job's learning rate."""
    fit: Callable[..., dict[str, Torch]] = _elsewhere
    """`fit(start, penalty=None, only=None, steps=None)`: the job's local steps from `start`, with an optimiser of its own; gives `start`'s
    names. `penalty(params)` is a scalar that is added to the task's loss, and makes the fit private: no hook runs inside. `only(name)` says
    what moves: True, False, or a mask of the tensor's shape; what does not move has no moments and stands still. `steps`: how many, from
    the round's first batch on; the job's number at most."""
    batches: Callable[[], Iterator[dict[str, Torch]]] = _elsewhere
    """`batches()`: the round's batches from the first on, the same in every call."""
    task_loss: Callable[..., Torch] = _elsewhere
    """`task_loss(params, batch)`: the task's mean loss at a point, a scalar."""
    losses: Callable[..., Torch] = _elsewhere
    """`losses(params, batch)`: the task's loss of every example at a point, (batch,)."""
    scores: Callable[..., Any] = _elsewhere
    """`scores(params, batch)`: what the head says at a point, (batch, labels); for causal models what `TaskEngine.forward` gives."""
    features: Callable[..., Torch] = _elsewhere
    """`features(params, batch)`: what the head reads at a point, (batch, hidden). Raises Refused for causal models."""
    hidden: Callable[..., Torch] = _elsewhere
    """`hidden(params, batch, layer=None)`: what enters `layer` at a point, (batch, length, hidden), zeros where there is no token; None:
    what leaves the last layer, after its norm."""
    choices: Callable[..., Torch] = _elsewhere
    """`choices(params, batch, tokens)`: a causal model's logits of some tokens at every answer place, (answers, len(tokens))."""
    gradient: Callable[..., tuple[float, dict[str, Torch]]] = _elsewhere
    """`gradient(params, batch)`: value and gradient at a point of all that the stack makes of the loss (`objective`, `loss`)."""
    split: Callable[..., Iterator[dict[str, Torch]]] = _elsewhere
    """`split(batch, size=1)`: a batch in pieces of at most `size` examples."""
    seen: dict[str, Any] = field(default_factory=dict)
    """What functions that were attached left there in the last forward pass."""
    examples: "Sequence[dict[str, Any]]" = ()
    """The device's examples of this round, as `collate` takes them; after `data`, what it gave."""
    held: "Sequence[dict[str, Any]]" = ()
    """Examples that are never trained on."""
    collate: Callable[..., dict[str, Torch]] = _elsewhere
    """`collate(examples)`: examples as one batch."""
    encode: Callable[..., "list[dict[str, Any]]"] = _elsewhere
    """`encode(rows)`: rows of the task as examples, such as public texts that came from the coordinator."""


class Method(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Base class: every hook does nothing. Fields are hyper-parameters with range and help in `Annotated[…, Meta]`."""

    space: ClassVar[str] = "any"
    """`factors` where A and B must keep their coordinates, `product` where they are renewed every round, `any` where it is all the same."""
    evidence: ClassVar[str] = "toy-checked"
    use_when: ClassVar[str] = ""
    releases: ClassVar[bool] = False
    """True for a privacy method: after its `send`, no later `send` may read data or state."""
    needs_all: ClassVar[bool] = False
    """True where hooks go over single updates several times: they are kept decoded, and a stack that leaves nothing but sums is refused."""
    codes: ClassVar[Literal["", "tensors", "floats"]] = ""
    """For a codec, what it takes: the adapter's `tensors` by name, or any `floats`. What it sends are no tensors of the adapter any
    more, so behind it come only codecs of floats, and releases."""
    sums: ClassVar[bool] = False
    """True where the coordinator sees nothing but sums: excludes whatever looks at or undoes single updates."""
    tells: ClassVar[Literal["", "public", "private"]] = ""
    """For what travels beside the update (`ctx.up`): `private` where it is made of examples, so that no release may be in the stack."""
    timed: ClassVar[bool] = False
    """True where the result depends on who arrives when: tests compare less."""
    example: ClassVar[Mapping[str, Any]] = {}
    """Settings for tests and documents where the defaults do not show what the method does."""
    plain: ClassVar[bool] = False
    """True where the gradient is the step: the job's loop is SGD, neither clipped nor warmed up. A job that says `adamw` is refused."""
    legs: ClassVar[tuple[str, ...]] = ("train",)
    """Parts of a round: each is asked of the same devices and survives kills like a round; in `train` updates are made."""

    # the adapter
    def tensors(self, spec: Spec, ctx: ServerContext) -> "dict[str, Tensor]":
        """[server] Tensors that the adapter has beside its factors, by name, with their first values.

        A function of settings, `spec` (every map that the job may adapt) and `ctx.rng`: it is asked again after a restart.
        """
        return {}

    def express(self, params: Mapping[str, Any], spec: Spec, xp: Any) -> dict[str, Any]:
        """[both] What the model computes with, made of what is trained: factors `<module>.A` (rank, in) and `.B` (out, rank), heads.

        `params` are all tensors of the adapter, after methods before this one; `xp` is torch (gradients go through) or NumPy (published and
        exported adapters). A function of its arguments alone: no randomness, no state. Names that it does not give stay as they are.
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
        """[server] The adapter that one device receives (compact); `ctx.down` carries extra tensors. What is left out it does not hold."""
        return adapter

    # which tensors
    def trains(self, name: str, ctx: ClientContext) -> bool:
        """[client] Is this tensor trained here in this round? Asked several times: a function of its arguments that writes no state."""
        return True

    def travels(self, name: str, ctx: ClientContext) -> bool:
        """[client] Does this tensor leave the device in this round? Asked several times, like `trains`.

        While it does not, a round starts from what was last trained here; once it travels again, from what arrives.
        """
        return True

    # on the device
    def attach(self, model: Places, spec: Spec, ctx: "StepContext | None") -> None:
        """[torch] Put functions into the model, at the places that `model` has; once a round, the engine takes them out after it.

        `ctx` is None where a published adapter is used (`edge-agent infer`): all that functions read then are heads and added tensors.
        """

    def data(self, examples: "list[dict[str, Any]]", ctx: StepContext) -> "list[dict[str, Any]]":
        """[torch] The examples that this round trains on. Give a new list; examples are kept between rounds, so do not change them."""
        return examples

    def arrived(self, params: Mapping[str, Torch], ctx: StepContext) -> "Tensors":
        """[torch] Look at the adapter as it arrived (the tensors that are trained here); NumPy, travels beside the update like `ctx.up`."""
        return {}

    def trained(self, params: Mapping[str, Torch], ctx: StepContext) -> "Tensors":
        """[torch] Look at the adapter as it was trained here; NumPy, travels beside the update like `ctx.up`."""
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
        """[torch] Replace the whole local loop: tensors of `start` as they were trained; names that are left out did not move."""
        raise NotImplementedError

    def gradient(self, params: Mapping[str, Torch], batch: dict[str, Torch], ctx: StepContext) -> tuple[float, dict[str, Torch]]:
        """[torch] Value and gradient of a batch for one step, all of `params`: from `ctx.gradient` at as many points as it takes."""
        raise NotImplementedError

    def loss(self, loss: Torch, params: Mapping[str, Torch], batch: dict[str, Torch], ctx: StepContext) -> Torch:
        """[torch] Change the training loss."""
        return loss

    def grad(self, grad: dict[str, Torch], params: Mapping[str, Torch], ctx: StepContext) -> dict[str, Torch]:
        """[torch] Change the gradient before it is clipped and the optimiser sees it; every name that came in."""
        return grad

    def serve(self, adapter: "Tensors", ctx: ClientContext) -> "Tensors":
        """[client] The adapter that the device uses between rounds."""
        return adapter

    # up
    def send(self, delta: "Tensors", ctx: ClientContext) -> "Tensors":
        """[client] Change what leaves the device; `ctx.up` carries extra tensors."""
        return delta

    def wire_bits(self, numbers: float, bits: float) -> float:
        """[server] Bits that `send` makes of `numbers` numbers of `bits` bits in all: what an upload is expected to cost."""
        return bits

    def receive(self, delta: "Tensors", update: "Update", ctx: ServerContext) -> "Tensors":
        """[server] Undo `send` for one update; runs in the reverse order of `send`.

        It may run more than once for an update: what it keeps in `ctx.state` must be the same after the second time.
        """
        return delta

    def ready(self, arrived: Sequence[Arrival], out: Sequence[str], elapsed: float, ctx: ServerContext) -> bool:
        """[server] May the round close, `elapsed` seconds after it was opened? `out`: devices that have not answered. Writes no state."""
        return not out

    def weigh(self, update: "Update", ctx: ServerContext) -> "Update | None":
        """[server] Reweigh, scale or (None) drop one update, seen alone, in device order: nothing is kept in memory for it."""
        return update

    def admit(self, updates: "list[Update]", ctx: ServerContext) -> "list[Update]":
        """[server] Drop, clip or reweigh updates, seen together."""
        return updates

    def reduce(self, updates: "Sequence[Update]", ctx: ServerContext) -> "Change":
        """[server] Many updates to one change of the global adapter, by map (`LowRank`) or tensor name (array)."""
        raise NotImplementedError

    def step(self, change: "Change", ctx: ServerContext) -> "Change":
        """[server] Change the aggregate before it is applied. What is left out does not move."""
        return change

    # a round of several legs
    def ask(self, device: str, ctx: ServerContext) -> "Tensors | None":
        """[server] What a device is asked in a leg other than `train` (`ctx.round.leg`); None: nothing."""
        return None

    def answer(self, question: "Tensors", ctx: StepContext) -> "Tensors":
        """[torch] The answer to what `ask` asked, NumPy; in a leg other than `train`, in which nothing is evaluated or trained."""
        return {}

    def hear(self, answers: "Mapping[str, Tensors]", ctx: ServerContext) -> "Change":
        """[server] All answers of a leg by device, in their order, without late ones; what they change of the adapter, before `step`."""
        return {}


EXCLUSIVE = ("objective", "train", "gradient", "ready", "reduce", "ask")
"""Hooks that one method of a stack may define."""
HOOKS = tuple(n for n, v in vars(Method).items() if callable(v) and not n.startswith("_"))


def overrides(method: Method, hook: str) -> bool:
    """Does this method's class define `hook` itself?"""
    return getattr(type(method), hook) is not getattr(Method, hook)
