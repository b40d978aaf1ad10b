"""The contract: a federated method is one class whose hooks are listed in the order data meets them.

Override the two or three hooks that a paper changes and leave the rest. [server] runs on the coordinator,
[client] on the device in NumPy, [step] on the device in torch, [both] on either side and must agree.
Each side has a private `ctx.state`, saved after every round; nothing else survives between rounds.
What crosses goes through `ctx.down` and `ctx.up`; the class is frozen, so nothing crosses by accident.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import msgspec

from .spec import Spec

if TYPE_CHECKING:
    import numpy as np

    from .tensors import Array, Tensors
    from .update import LowRank, Update

Space = Literal["any", "factors", "product"]
Torch = Any
"""A torch.Tensor. Typed loosely, so that this file needs no torch."""


@dataclass(frozen=True)
class Round:
    """Where the job stands: `number` counts from 0, `total` is the job's length."""

    number: int
    total: int


@dataclass
class ServerContext:
    """What a server hook may know. `fleet` is the number of devices enrolled in the job."""

    round: Round
    state: dict[str, Any]
    rng: "np.random.Generator"
    fleet: int
    space: str
    down: "Tensors" = field(default_factory=dict)


@dataclass
class ClientContext:
    """What a NumPy client hook may know. `anchor` is the adapter as received, compact."""

    round: Round
    device: str
    spec: Spec
    anchor: "Tensors"
    state: dict[str, Any]
    rng: "np.random.Generator"
    down: "Tensors"
    up: "Tensors"
    steps: int
    lr: float


@dataclass
class StepContext:
    """What a hook inside training may know; torch, on the training device, fp32 masters.

    `fit(start, penalty)` trains a further adapter from `start` with the job's own steps; `penalty` maps the live
    parameters to a scalar that is added to the loss. `task_loss(params, batch)` is the loss of the task alone.
    """

    round: Round
    device: str
    anchor: Mapping[str, Torch]
    down: Mapping[str, Torch]
    state: dict[str, Any]
    up: "Tensors"
    generator: Any
    steps: int
    lr: float
    fit: Callable[..., dict[str, Torch]]
    batches: Callable[[], Iterator[dict[str, Torch]]]
    task_loss: Callable[..., Torch]


class Method(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Base class: every hook does nothing. Fields are hyper-parameters with range and help in `Annotated[…, Meta]`."""

    space: ClassVar[Space] = "any"
    evidence: ClassVar[str] = "toy-checked"
    use_when: ClassVar[str] = ""
    releases: ClassVar[bool] = False
    """True for a privacy method: after its `send`, no later `send` may read data or state."""
    needs_all: ClassVar[bool] = False
    """True where `admit` or `reduce` must see single updates: excludes secure aggregation."""

    # down
    def select(self, devices: Sequence[str], ctx: ServerContext) -> Sequence[str]:
        """[server] Which devices take part in this round."""
        return devices

    def plan(self, job: dict[str, Any], device: str, ctx: ServerContext) -> dict[str, Any]:
        """[server] Adjust one device's assignment: `rank`, `depth`, `steps`, `lr`."""
        return job

    def offer(self, adapter: "Tensors", device: str, ctx: ServerContext) -> "Tensors":
        """[server] The adapter that one device receives (compact); `ctx.down` carries extra tensors."""
        return adapter

    # which tensors
    def trains(self, name: str, round: Round) -> bool:
        """[both] Is this tensor trained in this round?"""
        return True

    def travels(self, name: str, round: Round) -> bool:
        """[both] Does this tensor leave the device in this round?"""
        return True

    # on the device
    def attach(self, model: Any, spec: Spec, ctx: ClientContext) -> Any:
        """[client] Put the adapter into the model, another way than low-rank pairs."""
        return model

    def begin(self, adapter: "Tensors", ctx: ClientContext) -> "Tensors":
        """[client] The point that training starts from."""
        return adapter

    def batch(self, batch: dict[str, Torch], ctx: StepContext) -> dict[str, Torch]:
        """[step] Change a batch before it is used."""
        return batch

    def objective(self, params: Mapping[str, Torch], batch: dict[str, Torch], ctx: StepContext) -> Torch:
        """[step] Replace the task's loss."""
        raise NotImplementedError

    def train(self, start: dict[str, Torch], ctx: StepContext) -> dict[str, Torch]:
        """[step] Replace the whole local loop."""
        raise NotImplementedError

    def loss(self, loss: Torch, params: Mapping[str, Torch], batch: dict[str, Torch], ctx: StepContext) -> Torch:
        """[step] Change the training loss."""
        return loss

    def grad(self, grad: dict[str, Torch], params: Mapping[str, Torch], ctx: StepContext) -> dict[str, Torch]:
        """[step] Change the gradient before the optimiser sees it."""
        return grad

    def serve(self, adapter: "Tensors", ctx: ClientContext) -> "Tensors":
        """[client] The adapter that the device uses between rounds."""
        return adapter

    # up
    def send(self, delta: "Tensors", ctx: ClientContext) -> "Tensors":
        """[client] Change what leaves the device; `ctx.up` carries extra tensors."""
        return delta

    def receive(self, delta: "Tensors", update: "Update", ctx: ServerContext) -> "Tensors":
        """[server] Undo `send` for one update; runs in the reverse order of `send`.

        It may run more than once for an update: what it keeps in `ctx.state` must be the same after the second time.
        """
        return delta

    def ready(self, arrived: int, invited: int, ctx: ServerContext) -> bool:
        """[server] May the round close?"""
        return arrived >= invited

    def admit(self, updates: "list[Update]", ctx: ServerContext) -> "list[Update]":
        """[server] Drop, clip or reweigh updates, seen together."""
        return updates

    def reduce(self, updates: "list[Update]", ctx: ServerContext) -> "dict[str, Array | LowRank]":
        """[server] Many updates to one change of the global adapter, by module or tensor name."""
        raise NotImplementedError

    def step(self, change: "dict[str, Array | LowRank]", ctx: ServerContext) -> "dict[str, Array | LowRank]":
        """[server] Change the aggregate before it is applied."""
        return change


EXCLUSIVE = ("attach", "objective", "train", "ready", "reduce")
"""Hooks that one method of a stack may define."""
HOOKS = tuple(n for n, v in vars(Method).items() if callable(v) and not n.startswith("_"))


def overrides(method: Method, hook: str) -> bool:
    """Does this method's class define `hook` itself?"""
    return getattr(type(method), hook) is not getattr(Method, hook)
