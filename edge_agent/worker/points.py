"""The model of a round at any point: a point is a dictionary of tensors, and what it leaves out is where
training stands.

Nothing is written into the model's own parameters: what hooks look at are functions of the point, and
gradients go through them.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from rankfleet.federated.contract.client_side import ClientSide
from rankfleet.federated.contract.contexts import StepContext
from rankfleet.federated.contract.hook_errors import check_tensors, run_hook
from rankfleet.federated.errors import HookError, Refused

from ..model import Base
from ..model.places import Attached
from ..tasks import TaskEngine

Point = Mapping[str, Tensor]


class Points:
    """What a stack makes of an adapter, and what the base and the task make of that."""

    def __init__(self, base: Base, task: TaskEngine, client: ClientSide) -> None:
        self.base, self.task, self.client = base, task, client
        self.rest: dict[str, Tensor] = {}
        """All tensors of the adapter where training stands."""

    def attach(self, contexts: Mapping[str, StepContext]) -> None:
        """Let methods put their functions into the model. Raises Refused where the engine does not run the
        model itself."""
        users = self.client.stack.using("attach")
        if users and self.base.core is None:
            raise Refused(f"`{users[0][0]}` needs an architecture that this engine runs itself")
        places = Attached(self.base.sites)
        for name, method in users:
            run_hook(name, method, "attach", places, self.client.spec, contexts[name])
        if self.base.core is not None:
            self.base.core.places = places if users else None
        for ctx in contexts.values():
            ctx.seen = places.seen

    def check(self) -> None:
        """Do the methods' pairs fit the model? Raises HookError."""
        full = dict(self.rest)
        for name, method in self.client.stack.using("express"):
            given = run_hook(name, method, "express", full, self.client.spec, torch)
            check_tensors(name, "express", given, torch=True)
            full.update(given)
            for module, pair in self.client.spec.pairs.items():
                a, b = full[f"{module}.A"], full[f"{module}.B"]
                if (b.shape[0], a.shape[1]) != (pair.kept_out, pair.kept_in) or b.shape[1] != a.shape[0]:
                    shapes, map_shape = f"{tuple(b.shape)}·{tuple(a.shape)}", (pair.kept_out, pair.kept_in)
                    raise HookError(name, "express", f"gives `{module}` as {shapes}, the map is {map_shape}")

    def put(self, point: Point) -> dict[str, Tensor]:
        """Let the model compute at this point; gives all tensors that it computes with."""
        full = {**self.rest, **point}
        if self.client.stack.using("express"):
            full = self.client.stack.express(full, self.client.spec, torch)
        self.base.put(full)
        return full

    def scores(self, point: Point, batch: dict[str, Any]) -> Any:
        """What the task's head says of a batch, (batch, labels)."""
        full = self.put(point)
        return self.task.forward(self.base, {k: t for k, t in full.items() if k.startswith("head.")}, batch)

    def losses(self, point: Point, batch: dict[str, Any]) -> Tensor:
        """The task's loss of every example, (batch,)."""
        losses: Tensor = self.task.losses(self.scores(point, batch), batch)
        return losses

    def task_loss(self, point: Point, batch: dict[str, Any]) -> Tensor:
        """The task's mean loss."""
        return self.losses(point, batch).mean()

    def features(self, point: Point, batch: dict[str, Any]) -> Tensor:
        """What the head reads, (batch, hidden). Raises Refused for a task whose scores are of tokens."""
        self.put(point)
        features: Tensor = self.task.features(self.base, batch)
        return features

    def hidden(self, point: Point, batch: dict[str, Any], layer: int | None = None) -> Tensor:
        """What enters a layer, or leaves the last one, (batch, length, hidden); zeros where there is no
        token."""
        self.put(point)
        rows, layout = self.base.hidden(batch, layer)
        return layout.spread(rows)

    def choices(self, point: Point, batch: dict[str, Any], tokens: Sequence[int]) -> Tensor:
        """A causal model's logits of some tokens at every answer place, (answers, tokens)."""
        self.put(point)
        return self.base.choices(batch, tokens)
