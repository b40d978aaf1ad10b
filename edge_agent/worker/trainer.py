"""One round of local training: from an adapter view and the owner's rows to factor deltas.

The loop knows the order of hooks and nothing about any method. Parameters are fp32 masters; bf16 exists only inside the model.
"""

import contextlib
import math
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from rankfleet.federated.contract.method import StepContext
from rankfleet.federated.contract.stack import ClientSide, seed_of
from rankfleet.federated.contract.tensors import Tensors
from rankfleet.federated.errors import Refused
from rankfleet.federated.wire.messages import Assignment

from ..model import Base, as_tensor
from ..tasks import TaskEngine
from . import batches
from .batches import size_of
from .optimizer import Flat, optimizer
from .resume import Checkpoint

WARMUP = 0.1
Examples = list[dict[str, Any]]


class Trainer:
    """A base with an adapter in it, a task and one device's examples, for one assignment."""

    def __init__(
        self,
        base: Base,
        task: TaskEngine,
        job: Assignment,
        client: ClientSide,
        train: Examples,
        progress: Callable[[int, float], None] = lambda step, loss: None,
    ) -> None:
        self.base, self.task, self.job, self.client, self.examples, self.progress = base, task, job, client, train, progress
        self.last: dict[str, Tensor] = {}
        """Gradients of the last step."""
        self.checkpoint: Checkpoint | None = None
        self.micro = job.recipe.batch
        """Examples that are carried through the model at once; the gradient is that of the whole batch."""
        self.head: dict[str, Tensor] = {}
        self.contexts: dict[str, StepContext] = {}

    def run(self, start: Tensors, down: dict[str, Tensors]) -> Tensors:
        """Train from `start` (compact, by name) and return the trained tensors, fp32."""
        if self.base.prefix is None:
            used = sorted({i for picked in self._order() for i in picked})
            self.base.read_words([self.examples[i]["ids"] for i in used if "ids" in self.examples[i]])
        live = self._live(start)
        anchor = {k: p.detach().clone() for k, p in live.items()}
        self.contexts = {n: self._context(n, anchor, down.get(n, {})) for n in self.client.stack.methods}
        users = self.client.stack.using("train")
        if users:
            name, method = users[0]
            trained = method.train(dict(anchor), self.contexts[name])
        else:
            trained = self.fit(anchor)
        return {k: t.detach().cpu().numpy().astype("float32", copy=True) for k, t in trained.items()}

    def _live(self, start: Tensors) -> dict[str, Tensor]:
        """The trainable tensors as autograd sees them: factors inside the model, heads beside it."""
        stack, round = self.client.stack, self.client.round
        self.head = {k: as_tensor(start[k], self.base.device).requires_grad_(stack.trains(k, round)) for k in self.client.spec.dense}
        for name, p in self.base.parameters().items():
            p.data.copy_(as_tensor(start[name]))
            p.requires_grad_(stack.trains(name, round))
        return {**self.base.parameters(), **{k: t for k, t in self.head.items() if t.requires_grad}}

    def _context(self, name: str, anchor: dict[str, Tensor], down: Tensors) -> StepContext:
        seed = seed_of(self.job.job, self.job.round, self.client.device, name, "step")
        return StepContext(
            round=self.client.round,
            device=self.client.device,
            anchor=anchor,
            down={k: as_tensor(t, self.base.device) for k, t in down.items()},
            state=self.client.state[name],
            up=self.client.up[name],
            generator=torch.Generator().manual_seed(seed % 2**63),
            steps=self.job.recipe.steps,
            lr=self.job.recipe.lr,
            fit=self.fit,
            batches=self.batches,
            task_loss=self.task_loss,
        )

    def batches(self, skip: int = 0) -> Iterator[dict[str, Any]]:
        """The round's batches, seeded, without the first `skip`; see `batches.order`."""
        for picked in self._order()[skip:]:
            yield self._collate([self.examples[i] for i in picked])

    def _order(self) -> list[list[int]]:
        seed = seed_of(self.job.job, self.job.round, self.client.device, "batches") % 2**63
        return batches.order([size_of(e) for e in self.examples], self.job.recipe.batch, self.job.recipe.steps, seed)

    def _collate(self, examples: Examples) -> dict[str, Any]:
        """A batch; with the names of its examples where their lower layers' output is kept."""
        batch = self.task.collate(examples)
        if self.base.prefix is not None:
            batch["key"] = torch.tensor([e["key"] for e in examples])
        return batch

    def task_loss(self, params: dict[str, Tensor], batch: dict[str, Any]) -> Tensor:
        """Mean loss of the task; `params` are the live tensors, of which the head is handed on."""
        head = {k: params.get(k, t) for k, t in self.head.items()}
        loss: Tensor = self.task.losses(self.task.forward(self.base, head, batch), batch).mean()
        return loss

    def fit(self, start: dict[str, Tensor], penalty: Callable[[dict[str, Tensor]], Tensor] | None = None) -> dict[str, Tensor]:
        """The job's local steps from `start`. Hooks run unless `penalty` makes this a private fit. Raises Refused on NaN."""
        params: dict[str, Tensor] = {**self.base.parameters(), **{k: t for k, t in self.head.items() if t.requires_grad}}
        recipe, flat = self.job.recipe, Flat(params, start)
        optimiser = optimizer(recipe.optimizer, flat.values)
        warm = max(1, math.ceil(WARMUP * recipe.steps))
        checkpoint = self.checkpoint if penalty is None and not self.client.stack.using("train") else None
        done = checkpoint.restore(flat.values, optimiser.state, self.client, self.contexts) if checkpoint else 0
        for step, batch in enumerate(self.batches(done), done):
            loss, grads = self._step(params, batch, penalty)
            self.last = grads
            flat.take(grads)
            optimiser.step(flat.values, flat.gradient, recipe.lr * min(1.0, (step + 1) / warm))
            self.progress(step + 1, loss)
            if checkpoint and step + 1 < recipe.steps:
                checkpoint.after(step + 1, flat.values, optimiser.state, self.client, self.contexts)
        return {k: p.detach().clone() for k, p in params.items()}

    def _step(
        self, params: dict[str, Tensor], batch: dict[str, Any], penalty: Callable[..., Tensor] | None
    ) -> tuple[float, dict[str, Tensor]]:
        """Loss and gradients of one batch, hooks in their order."""
        stack, contexts = self.client.stack, self.contexts
        if self.micro < len(batch["labels"]) and penalty is None and not any(stack.using(h) for h in ("batch", "objective", "loss")):
            value, grads = self._in_pieces(params, batch)
        else:
            value, grads = self._at_once(params, batch, penalty)
        if penalty is None:
            for n, m in stack.using("grad"):
                grads = m.grad(grads, params, contexts[n])
        return value, grads

    def _at_once(
        self, params: dict[str, Tensor], batch: dict[str, Any], penalty: Callable[..., Tensor] | None
    ) -> tuple[float, dict[str, Tensor]]:
        stack, contexts = self.client.stack, self.contexts
        if penalty is None:
            for n, m in stack.using("batch"):
                batch = m.batch(batch, contexts[n])
        users = stack.using("objective")
        loss = users[0][1].objective(params, batch, contexts[users[0][0]]) if users else self.task_loss(params, batch)
        if penalty is None:
            for n, m in stack.using("loss"):
                loss = m.loss(loss, params, batch, contexts[n])
        else:
            loss = loss + penalty(params)
        value = _finite(float(loss.detach()))
        return value, dict(zip(params, torch.autograd.grad(loss, list(params.values())), strict=True))

    def _in_pieces(self, params: dict[str, Tensor], batch: dict[str, Any]) -> tuple[float, dict[str, Tensor]]:
        """Loss and gradients of a batch, a few examples after the other."""
        whole, value, total = len(batch["labels"]), 0.0, [torch.zeros_like(p) for p in params.values()]
        for at in range(0, whole, self.micro):
            piece = narrowed({k: t[at : at + self.micro] for k, t in batch.items()})
            loss = self.task_loss(params, piece) * (len(piece["labels"]) / whole)
            value += _finite(float(loss.detach()))
            torch._foreach_add_(total, list(torch.autograd.grad(loss, list(params.values()))))
        return value, dict(zip(params, total, strict=True))

    def samples(self, prompts: list[str]) -> list[str]:
        """Answers of the adapter as it stands, where the task can give any."""
        return self.task.samples(self.base, prompts) if hasattr(self.task, "samples") else []

    @torch.no_grad()
    def measure(self, examples: Examples, head: dict[str, Tensor] | None = None) -> dict[str, float]:
        """Sums over `examples` with the adapter as it stands: loss, its square, right answers, count."""
        head = head if head is not None else self.head
        batch = min(32, 4 * self.job.recipe.batch)
        total = {"loss": 0.0, "square": 0.0, "correct": 0.0, "count": 0.0}
        for at in range(0, len(examples), batch):
            made = self._collate(examples[at : at + batch])
            scores = self.task.forward(self.base, head, made)
            losses = self.task.losses(scores, made).double()
            total["loss"] += float(losses.sum())
            total["square"] += float(losses.square().sum())
            total["correct"] += float(self.task.correct(scores, made).sum())
            total["count"] += len(losses)
        return total


def narrowed(batch: dict[str, Any]) -> dict[str, Any]:
    """A piece of a batch without the columns that only its longer neighbours needed."""
    if "attention_mask" not in batch:
        return batch
    width = batch["attention_mask"].shape[1]
    longest = int(batch["attention_mask"].sum(1).max())
    return {k: t[:, :longest] if t.dim() > 1 and t.shape[1] == width else t for k, t in batch.items()}


def _finite(loss: float) -> float:
    if not math.isfinite(loss):
        raise Refused(f"training loss is {loss}", "lower the job's learning rate")
    return loss


class Stopwatch:
    """Seconds by name: `with watch("train"): …`."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextlib.contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Add the time of the block to `name`."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = round(self.seconds.get(name, 0.0) + time.perf_counter() - start, 4)
