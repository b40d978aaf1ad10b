"""One round of local training: from an adapter view and the owner's rows to factor deltas.

The loop knows the order of hooks and nothing about any method. Parameters are fp32 masters; bf16 exists
only inside the model.
"""

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from rankfleet.federated.contract.client_side import ClientSide
from rankfleet.federated.contract.contexts import StepContext
from rankfleet.federated.contract.hook_errors import check_state, check_tensors, run_hook
from rankfleet.federated.contract.stack import seed_of
from rankfleet.federated.contract.tensors import Tensors
from rankfleet.federated.errors import HookError, Refused
from rankfleet.federated.wire.messages import Assignment

from ..model import Base, as_tensor
from ..tasks import TaskEngine
from . import batches
from .batches import size_of, split
from .hooks import Params, Penalty, Steps
from .optimizer import Flat, optimizer
from .points import Points
from .resume import Checkpoint

Examples = list[dict[str, Any]]
IN_STEPS = ("batch", "objective", "loss", "gradient", "grad")


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
        self.base, self.task, self.job, self.client, self.examples, self.progress = (
            base,
            task,
            job,
            client,
            train,
            progress,
        )
        self.points = Points(base, task, client)
        self.last: Params = {}
        """Gradients of the last step."""
        self.checkpoint: Checkpoint | None = None
        self.steps = Steps(self.points, job.recipe.batch)
        self.contexts = self.steps.contexts
        self.start: Params = {}
        """Where training starts, by the names of what is trained here."""

    def prepare(self, arrived: Tensors, start: Tensors, down: dict[str, Tensors]) -> None:
        """All that hooks may look at, before anything is measured or trained; training stands at what
        `arrived` (all of the adapter).

        `start` are the tensors that are trained here, after `begin`. Raises Refused or HookError.
        """
        client, device = self.client, self.base.device
        if client.stack.plain and self.job.recipe.optimizer == "adamw":
            raise Refused(
                "a method that is required here needs the gradient to be the step, the job says `adamw`",
                "ask for it in the job",
            )
        self.points.rest = {k: as_tensor(t, device) for k, t in arrived.items()}
        received = {**self.points.rest, **{k: as_tensor(t, device) for k, t in client.own().items()}}
        # Factors before heads, by name: the order in which norms are summed.
        names = sorted(
            (k for k in start if k in client.spec.shapes() and client.trains(k)),
            key=lambda k: (k in client.spec.dense, k),
        )
        self.start = {k: as_tensor(start[k], device) for k in names if start[k].size}
        self.contexts.update({n: self._context(n, received, down.get(n, {})) for n in client.stack.methods})
        self.points.attach(self.contexts)
        self.points.check()
        self.points.put({})

    def run(self, start: Tensors, down: dict[str, Tensors]) -> Tensors:
        """Prepare and train at once, where what arrived is where training starts."""
        self.prepare(start, start, down)
        return self.train()

    def train(self) -> Tensors:
        """Train from the prepared start and return the trained tensors, fp32; training stands there
        afterwards."""
        stack = self.client.stack
        for n, m in stack.using("data"):
            self.examples = run_hook(n, m, "data", list(self.examples), self.contexts[n])
            if not isinstance(self.examples, list) or not self.examples:
                raise HookError(n, "data", "gives no list of examples", "leave at least one")
            for ctx in self.contexts.values():
                ctx.examples = self.examples
        self._read_words()
        self._stand_at_start()
        users = stack.using("train")
        if users:
            name, method = users[0]
            trained = run_hook(name, method, "train", dict(self.start), self.contexts[name])
            check_tensors(name, "train", trained, self.start, torch=True)
        else:
            trained = self._fit(self.start, checkpoint=self.checkpoint)
        for name, method in stack.methods.items():
            check_state(
                name,
                "` or `".join(h for h in ("train", *IN_STEPS) if (name, method) in stack.using(h)),
                self.client.state[name],
            )
        self.points.rest = {**self.points.rest, **{k: t.detach() for k, t in trained.items()}}
        return {k: t.detach().cpu().numpy().astype("float32", copy=True) for k, t in trained.items()}

    def look(self, hook: str) -> None:
        """`arrived` or `trained`: what methods see of the tensors that are trained here travels beside the
        update. Raises HookError."""
        if hook == "arrived":
            self._stand_at_start()
        for n, m in self.client.stack.using(hook):
            params = {
                k: self.contexts[n].received[k] if hook == "arrived" else self.points.rest[k]
                for k in self.start
            }
            self.client.up[n].update(self._answered(n, hook, run_hook(n, m, hook, params, self.contexts[n])))

    def answer(self, questions: dict[str, Tensors]) -> None:
        """What methods say in a leg in which nothing is trained. Raises HookError."""
        for n, m in self.client.stack.using("answer"):
            said = self._answered(
                n, "answer", run_hook(n, m, "answer", questions.get(n, {}), self.contexts[n])
            )
            self.client.up[n].clear()
            self.client.up[n].update(said)

    def _answered(self, name: str, hook: str, result: Tensors) -> Tensors:
        check_tensors(name, hook, result)
        check_state(name, hook, self.client.state[name])
        return result

    def _stand_at_start(self) -> None:
        self.points.rest = {
            **self.points.rest,
            **{k: as_tensor(t, self.base.device) for k, t in self.client.own().items()},
            **self.start,
        }

    def _read_words(self) -> None:
        """The embedding rows of the round's texts at once."""
        if self.base.prefix is None:
            used = sorted({i for picked in self._order() for i in picked})
            self.base.read_words([self.examples[i]["ids"] for i in used if "ids" in self.examples[i]])

    def _context(self, name: str, received: Params, down: Tensors) -> StepContext:
        seed = seed_of(self.job.job, self.job.round, self.client.device, name, "step")
        points = self.points
        return StepContext(
            round=self.client.round,
            device=self.client.device,
            received=received,
            start=self.start,
            down={k: torch.from_numpy(t.copy()).to(self.base.device) for k, t in down.items()},
            state=self.client.state[name],
            up=self.client.up[name],
            generator=torch.Generator().manual_seed(seed % 2**63),
            steps=self.job.recipe.steps,
            lr=self.job.recipe.lr,
            fit=self.fit,
            batches=self.batches,
            task_loss=points.task_loss,
            losses=points.losses,
            scores=points.scores,
            features=points.features,
            hidden=points.hidden,
            choices=points.choices,
            gradient=self.steps.gradient,
            split=split,
            examples=self.examples,
            collate=self.collate,
            encode=self.task.encode,
        )

    def batches(self, skip: int = 0) -> Iterator[dict[str, Any]]:
        """The round's batches, seeded, without the first `skip`; see `batches.order`."""
        for picked in self._order()[skip:]:
            yield self.collate([self.examples[i] for i in picked])

    def _order(self) -> list[list[int]]:
        seed = seed_of(self.job.job, self.job.round, self.client.device, "batches") % 2**63
        return batches.order(
            [size_of(e) for e in self.examples], self.job.recipe.batch, self.job.recipe.steps, seed
        )

    def collate(self, examples: Examples) -> dict[str, Any]:
        """A batch; with the names of its examples where their lower layers' output is kept."""
        batch = self.task.collate(examples)
        if self.base.prefix is not None and all("key" in e for e in examples):
            batch["key"] = torch.tensor([e["key"] for e in examples])
        return batch

    def fit(
        self,
        start: Params,
        penalty: Penalty | None = None,
        only: Callable[[str], Any] | None = None,
        steps: int | None = None,
    ) -> Params:
        """The job's local steps from `start`; `StepContext.fit` says what the arguments mean. Raises
        Refused on NaN."""
        return self._fit(start, penalty, only, steps)

    def _fit(
        self, start: Params, penalty: Penalty | None = None, only: Callable[[str], Any] | None = None,
        steps: int | None = None,
        checkpoint: Checkpoint | None = None,
    ) -> Params:  # fmt: skip
        moves = {k: True if only is None else only(k) for k in start}
        masks = {k: self._mask(k, m, start[k]) for k, m in moves.items() if not isinstance(m, bool)}
        params = {k: t.detach().clone().requires_grad_() for k, t in start.items() if moves[k] is not False}
        recipe, flat, before = self.job.recipe, Flat(params, start), self.points.rest
        steps = recipe.steps if steps is None else min(steps, recipe.steps)
        optimiser, warm = optimizer(recipe.optimizer, flat.values), max(1, math.ceil(recipe.warmup * steps))
        done = (
            checkpoint.restore(flat.values, optimiser.state, self.client, self.contexts) if checkpoint else 0
        )
        try:
            self.points.rest = {**before, **{k: t.detach() for k, t in start.items()}, **params}
            for step, batch in zip(range(done, steps), self.batches(done), strict=False):
                loss, self.last = self.steps.step(params, batch, penalty)
                flat.take({k: g * masks[k] if k in masks else g for k, g in self.last.items()}, recipe.clip)
                optimiser.step(flat.values, flat.gradient, recipe.lr * min(1.0, (step + 1) / warm))
                self.progress(step + 1, loss)
                if checkpoint and step + 1 < steps:
                    checkpoint.after(step + 1, flat.values, optimiser.state, self.client, self.contexts)
        finally:
            self.points.rest = before
        return {k: params.get(k, t).detach().clone() for k, t in start.items()}

    def _mask(self, name: str, mask: Any, like: Tensor) -> Tensor:
        user = next((n for n, _ in self.client.stack.using("train")), "")
        if tuple(getattr(mask, "shape", ())) != tuple(like.shape):
            what = f"says {mask!r:.60} of `{name}` in `only`"
            raise HookError(user, "train", what, f"True, False or a mask of shape {tuple(like.shape)}")
        return torch.as_tensor(mask, device=like.device).to(like.dtype)

    def samples(self, prompts: list[str]) -> list[str]:
        """Answers of the adapter where training stands, where the task can give any."""
        self.points.put({})
        return self.task.samples(self.base, prompts) if hasattr(self.task, "samples") else []

    @torch.no_grad()
    def measure(self, examples: Examples, tensors: Tensors | None = None) -> dict[str, float]:
        """Sums over `examples` where training stands, or with `tensors` in their place: loss, its square,
        right answers, count."""
        batch = min(32, 4 * self.job.recipe.batch)
        total = {"loss": 0.0, "square": 0.0, "correct": 0.0, "count": 0.0}
        point = {k: as_tensor(t, self.base.device) for k, t in (tensors or {}).items()}
        for at in range(0, len(examples), batch):
            collated = self.collate(examples[at : at + batch])
            scores = self.points.scores(point, collated)
            losses = self.task.losses(scores, collated).double()
            total["loss"] += float(losses.sum())
            total["square"] += float(losses.square().sum())
            total["correct"] += float(self.task.correct(scores, collated).sum())
            total["count"] += len(losses)
        return total
