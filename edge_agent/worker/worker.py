"""The worker's way through one order: check, load, and a round on what was loaded. NumPy and torch live
here."""

import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rankfleet.federated.contract.catalogue import build_stack
from rankfleet.federated.contract.method import overrides
from rankfleet.federated.contract.spec import Spec
from rankfleet.federated.errors import DoesNotFit, Refused, WireError
from rankfleet.federated.program.files import digest_of
from rankfleet.federated.tasks import task_kind
from rankfleet.federated.trust.roster import signed_by
from rankfleet.federated.wire.messages import Assignment, read_assignment, unpack
from rankfleet.profiles.card import ModelCard, read_card
from rankfleet.profiles.kernels import half
from rankfleet.profiles.memory import StepPlan, step_plan

from ..machine import system
from ..machine.accelerator import accelerator
from ..model import Base
from ..model.stored.prepared import Shelf
from ..order import Order, checkpoint_file
from ..tasks import TaskEngine, engine
from ..trust import identity, warrant
from .data import Shard
from .local_round import LocalRound, Progress
from .resume import Checkpoint
from .stopwatch import Stopwatch
from .trainer import Examples
from .view import View

log = logging.getLogger(__name__)
IDLE_S, SERVE_S = 0.3, 30.0
"""Rounds that follow each other faster than this do not all put their adapter in place for applications."""


class Worker:
    """Keeps what costs time between rounds: the prepared base, the encoded examples, the model card."""

    round: type[LocalRound] = LocalRound

    def __init__(self) -> None:
        self._base: tuple[str, Base] | None = None
        self._data: tuple[str, tuple[TaskEngine, Examples, Examples, Shard]] | None = None
        self._cards: dict[str, ModelCard] = {}
        self._state: tuple[Path, dict[str, Any]] | None = None
        """Methods' state after the last round, and the file that it is also in."""
        self._serves: Callable[[], None] | None = None
        self._served = 0.0
        self._pinned = False
        self.written_mb = 0.0
        """What went to disk and is not in a report yet."""

    def idle(self) -> None:
        """Nothing to do: put the last adapter in place for applications."""
        serves, self._serves = self._serves, None
        if serves is not None:
            serves()
            self._served = time.monotonic()

    def idle_in(self) -> float | None:
        """Seconds after which `idle` has something to do, unless an order comes first; None: nothing."""
        return None if self._serves is None else max(IDLE_S, self._served + SERVE_S - time.monotonic())

    def run(self, order: Order, progress: Progress) -> None:
        """Do what the order says and leave the result in its folder. Raises RankfleetError with the
        reason."""
        job = _verified(order)
        warrant.check(identity.known(Path(order.home)), Path(order.home), order.blobs, job)
        if time.monotonic() - self._served > 2 * SERVE_S:
            self.idle()
        with system.slot(order.slots):
            if not self._pinned:
                self._pinned = True
                system.pin(order.threads)
            torch.set_num_threads(order.threads)
            self._round(order, job, progress)

    def _round(self, order: Order, job: Assignment, progress: Progress) -> None:
        watch, view = Stopwatch(), View(order.blobs)
        with watch("load"):
            plan = self._fits(order, job, view.spec)
            base = self._prepared(order, job, view)
            task, train, held, shard = self._examples(order, job)
        known, self._state = self._state, None
        try:
            local = self.round(order, job, view, base, task, train, watch, progress, known)
            local.told["skipped"] = shard.unknown
            self._carry_out(order, local, plan, held)
        finally:
            base.clear()  # the base outlives the job, what its methods put in does not

    def _carry_out(self, order: Order, local: LocalRound, plan: StepPlan, held: Examples) -> None:
        job, base = local.job, local.base
        local.trainer.steps.micro = plan.micro
        local.trainer.checkpoint = Checkpoint(
            checkpoint_file(Path(order.result)), digest_of(order.envelope), system.halted
        )
        if base.core is not None:
            base.core.checkpointing = plan.checkpointing
        if job.purpose == "train":
            local.cache(
                held,
                order.budget_mb - plan.memory_mb,
                min(order.cache_mb, max(0.0, order.writes_mb - self.written_mb)),
            )
        else:
            base.prefix = None
        if local.client.round.leg == "train" or job.purpose == "install":
            local.evaluate(held)
        sent = local.install() if job.purpose == "install" else local.train()
        local.lighten()
        local.counts["disk_mb"] = round(self.written_mb + local.counts.get("cache_written_mb", 0.0), 3)
        self.written_mb = 0.0
        local.commit(sent)
        local.trainer.checkpoint.done()
        self._state, self._serves = local.state, local.serves
        if job.purpose == "install":
            self.idle()

    def _fits(self, order: Order, job: Assignment, spec: Spec) -> StepPlan:
        """How a batch is carried out in the memory that there is. Refuses before anything is allocated.
        Raises Refused or DoesNotFit."""
        card = self._card(Path(order.model))
        if card.digest != job.model_digest:
            raise Refused(
                f"model `{job.model}` in {order.model} has digest {card.digest[:12]}, the job wants "
                f"{job.model_digest[:12]}",
                "put the same files on every device",
            )
        placement = {
            k: max(1, p.rank) for k, p in spec.pairs.items() if p.trained
        }  # what stands in for a pair keeps its input too
        recipe, head = job.recipe, sum(int(np.prod(d.shape)) for d in spec.dense.values())
        # Functions that methods attach leave things for the loss: a layer that is computed again would leave
        # them a second time.
        again = not any(overrides(m, "attach") for m in build_stack(job.stack).values())
        plan = step_plan(
            card,
            placement,
            recipe.prune,
            recipe.bits,
            recipe.batch,
            job.task.max_length,
            head,
            order.budget_mb,
            again,
        )
        if plan.memory_mb > order.budget_mb:
            raise DoesNotFit(
                f"the arm needs {plan.memory_mb:.0f} MB, this device allows {order.budget_mb:.0f} MB",
                "lower rank or depth, prune, or use fewer bits",
            )
        return plan

    def _card(self, folder: Path) -> ModelCard:
        if str(folder) not in self._cards:
            try:
                self._cards[str(folder)] = read_card(folder)
            except (OSError, ValueError) as error:
                raise Refused(f"base model: {error}", "correct `models` in the agent's YAML") from None
        return self._cards[str(folder)]

    def _prepared(self, order: Order, job: Assignment, view: View) -> Base:
        names = (
            sorted(
                {m.name for m in self._card(Path(order.model)).modules}
                & ({k.removesuffix(".out").removesuffix(".in") for k in view.masks} | set(view.spec.pairs))
            )
            if job.recipe.bits >= 16
            else [m.name for m in self._card(Path(order.model)).modules]
        )
        masks = Path(order.blobs["masks"]).name if "masks" in order.blobs else ""
        causal = task_kind(job.task.kind).causal
        in_half = half(order.kernel_ms, self._card(Path(order.model)).hidden)
        key = f"{job.model_digest} {job.recipe.bits} {masks} {names} {causal} {in_half}"
        if self._base is None or self._base[0] != key:
            self._base = None
            self._base = (key, self._opened(order, job, names, view, in_half))
        return self._base[1]

    def _opened(self, order: Order, job: Assignment, names: list[str], view: View, in_half: bool) -> Base:
        """From the shelf of prepared bases, where the disk has room for one; else made in memory."""
        args = (Path(order.model), names, job.recipe.bits, view.masks, task_kind(job.task.kind).causal)
        device = accelerator(order.accelerator)
        if order.shelf_mb > 0:
            shelf = Shelf(Path(order.home) / "bases", order.shelf_mb, order.writes_mb)
            try:
                base = Base(*args, half=in_half, shelf=shelf, digest=job.model_digest, device=device)
                self.written_mb += shelf.written / 1e6
                return base
            except OSError as error:
                log.warning("the prepared base cannot be kept on disk (%s); it is made in memory", error)
        return Base(*args, half=in_half, digest=job.model_digest, device=device)

    def _examples(self, order: Order, job: Assignment) -> tuple[TaskEngine, Examples, Examples, Shard]:
        key = repr((order.dataset, job.task, order.model))
        if self._data is None or self._data[0] != key:
            task = engine(job.task, order.model)
            shard = Shard(
                order.dataset, job.task.dataset, task.fields, job.task.labels, getattr(task, "optional", ())
            )
            train, held = task.encode(shard.train), task.encode(shard.held)
            if not train:
                raise Refused(
                    f"dataset `{job.task.dataset}`: no example has an answer to learn",
                    "map `output` under its `columns`",
                )
            shard.unknown += getattr(task, "skipped", 0)
            self._data = (key, (task, train, held, shard))
        return self._data[1]


def _verified(order: Order) -> Assignment:
    """The assignment, if the coordinator of this fleet signed it. Raises WireError."""
    envelope = unpack(order.envelope)
    if not signed_by(identity.known(Path(order.home)).coordinator, envelope.signature, envelope.body):
        raise WireError("the assignment is not signed by this fleet's coordinator", "enrol the device again")
    return read_assignment(envelope.body)
