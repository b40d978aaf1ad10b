"""The loss and the gradients of batches: the hooks inside a local step, in their order."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from rankfleet.federated.contract.contexts import StepContext
from rankfleet.federated.contract.hook_errors import check_tensors, run_hook
from rankfleet.federated.errors import HookError, Refused

from .batches import narrowed
from .points import Points

Params = dict[str, Tensor]
Penalty = Callable[[Params], Tensor]


class Steps:
    """What a stack makes of the loss at any point, with every method's context."""

    def __init__(self, points: Points, micro: int) -> None:
        self.points, self.stack = points, points.client.stack
        self.contexts: dict[str, StepContext] = {}
        self.micro = micro
        """Examples that are carried through the model at once; the gradient is that of the whole batch."""

    def gradient(self, params: Params, batch: dict[str, Any]) -> tuple[float, Params]:
        """Value and gradient at any point, of what the stack makes of the loss."""
        leaves = {
            k: p if p.is_leaf and p.requires_grad else p.detach().requires_grad_() for k, p in params.items()
        }
        return self._loss_and_grads(leaves, batch, None)

    def step(self, params: Params, batch: dict[str, Any], penalty: Penalty | None) -> tuple[float, Params]:
        """Loss and gradients of one batch of `fit`; with a penalty no hook runs. Raises Refused on NaN,
        HookError."""
        if penalty is not None:
            return self._loss_and_grads(params, batch, penalty)
        stack, contexts = self.stack, self.contexts
        for n, m in stack.using("batch"):
            batch = run_hook(n, m, "batch", batch, contexts[n])
        if users := stack.using("gradient"):
            name, method = users[0]
            answer = run_hook(name, method, "gradient", params, batch, contexts[name])
            if not isinstance(answer, tuple) or len(answer) != 2:
                what = f"returns a {type(answer).__name__}, not a value and gradients"
                raise HookError(name, "gradient", what, "return (value, gradients by name)")
            value, grads = answer
            check_tensors(name, "gradient", grads, params, torch=True, whole=True)
            _finite(float(value))
        else:
            value, grads = self._loss_and_grads(params, batch, None)
        for n, m in stack.using("grad"):
            grads = run_hook(n, m, "grad", grads, params, contexts[n])
            check_tensors(n, "grad", grads, params, torch=True, whole=True)
        return value, grads

    def _loss_and_grads(
        self, params: Params, batch: dict[str, Any], penalty: Penalty | None
    ) -> tuple[float, Params]:
        with torch.enable_grad():
            stack = self.stack
            if (
                self.micro < len(batch["labels"])
                and penalty is None
                and not any(stack.using(h) for h in ("batch", "objective", "loss"))
            ):
                return self._in_pieces(params, batch)
            loss = self._loss(params, batch, penalty)
            return _finite(float(loss.detach())), dict(
                zip(params, _grads(loss, list(params.values())), strict=True)
            )

    def _loss(self, params: Params, batch: dict[str, Any], penalty: Penalty | None) -> Tensor:
        """What the stack makes of the loss of a batch."""
        stack, contexts = self.stack, self.contexts
        users = stack.using("objective")
        loss = (
            run_hook(users[0][0], users[0][1], "objective", params, batch, contexts[users[0][0]])
            if users
            else self.points.task_loss(params, batch)
        )
        _scalar(users[0][0] if users else "", "objective", loss)
        if penalty is not None:
            return loss + penalty(params)
        for n, m in stack.using("loss"):
            loss = run_hook(n, m, "loss", loss, params, batch, contexts[n])
            _scalar(n, "loss", loss)
        return loss

    def _in_pieces(self, params: Params, batch: dict[str, Any]) -> tuple[float, Params]:
        """Loss and gradients of a batch, a few examples after the other."""
        whole, value, total = len(batch["labels"]), 0.0, [torch.zeros_like(p) for p in params.values()]
        for at in range(0, whole, self.micro):
            piece = narrowed({k: t[at : at + self.micro] for k, t in batch.items()})
            loss = self.points.task_loss(params, piece) * (len(piece["labels"]) / whole)
            value += _finite(float(loss.detach()))
            torch._foreach_add_(total, list(_grads(loss, list(params.values()))))
        return value, dict(zip(params, total, strict=True))


def _scalar(name: str, hook: str, loss: Any) -> None:
    if not isinstance(loss, Tensor) or loss.dim():
        shape = f" of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else ""
        raise HookError(
            name,
            hook,
            f"gives a {type(loss).__name__}{shape}, which is no scalar loss",
            "`.mean()` over the batch",
        )


def _grads(loss: Tensor, leaves: list[Tensor]) -> list[Tensor]:
    """Gradients; zeros for what the loss does not depend on."""
    if not leaves or not loss.requires_grad:
        return [torch.zeros_like(p) for p in leaves]
    grads = torch.autograd.grad(loss, leaves, allow_unused=True)
    return [torch.zeros_like(p) if g is None else g for g, p in zip(grads, leaves, strict=True)]


def _finite(loss: float) -> float:
    if not math.isfinite(loss):
        raise Refused(f"training loss is {loss}", "lower the job's learning rate")
    return loss
