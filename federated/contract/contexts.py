"""What hooks are given: where the job stands, the adapter, devices, and one context for each kind of hook."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypedDict

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
    """Is it trained, sent and averaged like a head? Else every device has it, and it moves only when
    `reduce` or `step` names it."""


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
    """Map → rank, at most what the tuner chose; 0: it takes part and has no factors of its own. Maps that
    are left out arrive frozen."""
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
    """What was admitted, in device order: for `step`, and for a `reduce` that looks again. Decoded when
    they are looked at."""
    mean: "Callable[[Sequence[Update]], Change]" = _only_in_a_round
    """`mean(updates)`: the engine's own holder-normalised aggregate of any of them, such as a group."""
    maps: Mapping[str, Any] = field(default_factory=dict)
    """Maps that the job may adapt, by name, each with `layer`, `out`, `in_` and `role`."""
    carry: "dict[str, LowRank]" = field(default_factory=dict)
    """For `reduce` and `step`: map → what all devices shall apply frozen from the next version on, s
    included, beside what they do already. Added up by the engine, and cut to the map's own size."""
    of: Callable[[str], dict[str, Any]] = _only_in_a_round
    """`of(device)`: this method's memory of one device, a file of its own, so that a round rewrites those
    alone that it changed. Written by `weigh`, `admit`, `reduce` and `step`, read by all hooks."""


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
    """The tensors that are trained here, as they arrived, compact fp32; what this device keeps for itself
    is in its place."""
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

    A point is a dictionary of tensors by name: leaves, results of other tensors or constants. Names that
    it leaves out are taken from where training stands (inside `fit`: from what `fit` started with), so any
    part of the adapter may be named, factors as well as heads. Functions that look at the model go through
    what `express` and `attach` of the whole stack make of a point; gradients go through them.
    """

    round: Round
    """Where the job stands."""
    device: str
    """This device's name."""
    received: Mapping[str, Torch]
    """All tensors of the adapter that this device holds, as they arrived (fp32), trained or not; what it
    keeps for itself in its place."""
    start: Mapping[str, Torch]
    """Where training starts: the tensors that are trained here, after every method's `begin`."""
    down: Mapping[str, Torch]
    """What this method's `offer` sent along, in its dtypes."""
    state: dict[str, Any]
    """This method's memory on this device: NumPy arrays, numbers and texts (no torch tensors), saved with
    every round."""
    up: "Tensors"
    """What travels beside the update, NumPy; `update.extra_of(self)` at the coordinator."""
    generator: Any
    """A torch.Generator on the CPU, seeded by job, round, device and method."""
    steps: int
    """Local steps of this round."""
    lr: float
    """The job's learning rate."""
    fit: Callable[..., dict[str, Torch]] = _elsewhere
    """`fit(start, penalty=None, only=None, steps=None)`: the job's local steps from `start`, with an
    optimiser of its own; gives `start`'s names. `penalty(params)` is a scalar that is added to the task's
    loss, and makes the fit private: no hook runs inside. `only(name)` says what moves: True, False, or a
    mask of the tensor's shape; what does not move has no moments and stands still. `steps`: how many, from
    the round's first batch on; the job's number at most."""
    batches: Callable[[], Iterator[dict[str, Torch]]] = _elsewhere
    """`batches()`: the round's batches from the first on, the same in every call."""
    task_loss: Callable[..., Torch] = _elsewhere
    """`task_loss(params, batch)`: the task's mean loss at a point, a scalar."""
    losses: Callable[..., Torch] = _elsewhere
    """`losses(params, batch)`: the task's loss of every example at a point, (batch,)."""
    scores: Callable[..., Any] = _elsewhere
    """`scores(params, batch)`: what the head says at a point, (batch, labels); for causal models what
    `TaskEngine.forward` gives."""
    features: Callable[..., Torch] = _elsewhere
    """`features(params, batch)`: what the head reads at a point, (batch, hidden). Raises Refused for
    causal models."""
    hidden: Callable[..., Torch] = _elsewhere
    """`hidden(params, batch, layer=None)`: what enters `layer` at a point, (batch, length, hidden), zeros
    where there is no token; None: what leaves the last layer, after its norm."""
    choices: Callable[..., Torch] = _elsewhere
    """`choices(params, batch, tokens)`: a causal model's logits of some tokens at every answer place,
    (answers, len(tokens))."""
    gradient: Callable[..., tuple[float, dict[str, Torch]]] = _elsewhere
    """`gradient(params, batch)`: value and gradient at a point of all that the stack makes of the loss
    (`objective`, `loss`)."""
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
