"""A method outside the catalogue that uses the hooks that no shipped method needs yet. Loaded by
tests/test_hooks.py under a name."""

from collections.abc import Mapping
from typing import Any, ClassVar

from rankfleet.federated.contract.contexts import ClientContext, ServerContext, StepContext, Torch
from rankfleet.federated.contract.method import Method
from rankfleet.federated.contract.places import Places
from rankfleet.federated.contract.spec import Spec

CALLED: list[str] = []


class EveryHook(Method, frozen=True):
    """plan, travels, attach, batch, objective, step."""

    use_when: ClassVar[str] = "in tests"

    def plan(self, job: dict[str, Any], device: str, ctx: ServerContext) -> dict[str, Any]:
        """One step for everybody, at half the rate, rank 1."""
        CALLED.append("plan")
        return {**job, "steps": 1, "lr": job["lr"] / 2, "rank": 1}

    def travels(self, name: str, ctx: ClientContext) -> bool:
        """The head's bias stays at home."""
        return name != "head.bias"

    def attach(self, model: Places, spec: Spec, ctx: StepContext | None) -> None:
        """Look only."""
        CALLED.append("attach")
        assert spec.pairs

    def batch(self, batch: dict[str, Torch], ctx: StepContext) -> dict[str, Torch]:
        """Half of the batch."""
        CALLED.append("batch")
        return {k: v[:2] for k, v in batch.items()}

    def objective(self, params: Mapping[str, Torch], batch: dict[str, Torch], ctx: StepContext) -> Torch:
        """Twice the task's loss."""
        CALLED.append("objective")
        assert len(batch["labels"]) == 2
        return 2 * ctx.task_loss(params, batch)

    def step(self, change: dict[str, Any], ctx: ServerContext) -> dict[str, Any]:
        """Half of the aggregate."""
        CALLED.append("step")
        return {k: (type(v)(v.B / 2, v.A) if hasattr(v, "B") else v / 2) for k, v in change.items()}
