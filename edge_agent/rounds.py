"""The worker's way through one order: check, load, measure, train, encode, commit. NumPy and torch live here."""

import logging
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch

from federated.catalogue import build_stack
from federated.errors import Conflict, DoesNotFit, NotFinite, Refused, WireError
from federated.files import digest_of
from federated.messages import Assignment, manifest, read_assignment, unpack
from federated.method import Round, overrides
from federated.roster import signed_by
from federated.spec import Spec
from federated.stack import ClientSide, Stack
from federated.tensors import Array, Tensors
from federated.transfer import blob_of
from federated.wire import encode, freeze, open_frame, thaw
from profiles.card import ModelCard, read_card
from profiles.kernels import half
from profiles.memory import StepPlan, step_plan

from . import current, identity, system, warrant
from .checkpoint import Checkpoint
from .data import Shard
from .model import Base, as_tensor, importance
from .model.activations import example_key
from .model.prefix import choose, trained_from
from .model.prepared import Shelf
from .order import Meta, Order, checkpoint_file, commit, last_state, state_file
from .tasks import TaskEngine, engine
from .trainer import Examples, Stopwatch, Trainer

log = logging.getLogger(__name__)
Progress = Callable[[dict[str, Any]], None]
IDLE_S, SERVE_S = 0.3, 30.0
"""Rounds that follow each other faster than this do not all put their adapter in place for applications."""


class View:
    """What arrived from the coordinator for one round: spec, tensors, masks, and extras of methods."""

    def __init__(self, blobs: dict[str, str]) -> None:
        tensors, meta = open_frame(Path(blobs["view"]))
        spec = msgspec.convert(meta, Spec)
        frozen, below = open_frame(Path(blobs["frozen"])) if "frozen" in blobs else ({}, None)
        pairs = {**spec.pairs, **(msgspec.convert(below, Spec).pairs if below else {})}
        self.spec = Spec(pairs, spec.dense)
        self.masks = {k: np.array(t) for k, t in open_frame(Path(blobs["masks"]))[0].items()} if "masks" in blobs else {}
        self.down: dict[str, Tensors] = {}
        self.tensors: Tensors = {}
        own: Tensors = {}
        for name, array in {**frozen, **tensors}.items():
            if name.startswith("x/"):
                _, method, key = name.split("/", 2)
                self.down.setdefault(method, {})[key] = np.array(array)
            else:
                own[name] = array
        self.tensors = widened(own)

    def trained(self) -> Tensors:
        """The part of the view that is trained here."""
        return {k: self.tensors[k] for k in self.spec.shapes()}


def widened(tensors: Tensors) -> Tensors:
    """The same arrays as fp32, checked. In one piece: torch widens fp16 twenty times as fast as NumPy. Raises NotFinite."""
    if not tensors:
        return {}
    kinds = {t.dtype for t in tensors.values()}
    whole = np.concatenate([t.reshape(-1) if len(kinds) == 1 else t.reshape(-1).astype(np.float32) for t in tensors.values()])
    flat: Array = torch.from_numpy(whole).float().numpy()
    found, at = {}, 0
    for name, t in tensors.items():
        found[name] = flat[at : at + t.size].reshape(t.shape)
        at += t.size
    if not np.isfinite(flat).all():
        bad = next(k for k, t in found.items() if not np.isfinite(t).all())
        raise NotFinite(f"tensor `{bad}` of the adapter holds NaN or infinity")
    return found


class LocalRound:
    """One assignment on one device, with everything prepared. `told` becomes the report that travels with the update."""

    trains_with: Any = Trainer

    def __init__(
        self, order: Order, job: Assignment, view: View, base: Base, task: TaskEngine, train: Examples, watch: Stopwatch,
        progress: Progress,
        known: "tuple[Path, dict[str, Any]] | None" = None,
    ) -> None:  # fmt: skip
        self.order, self.job, self.view, self.watch, self.base = order, job, view, watch, base
        self.key, self.device = identity.signer(Path(order.home)), identity.known(Path(order.home)).device
        self.told: dict[str, Any] = {"version": job.version, "bits": job.recipe.bits}
        self.serves: Callable[[], None] = lambda: None
        self.counts: dict[str, float] = {}
        self.state = known
        result = Path(order.result)
        if known and known[0].parent == result.parent and known[0].name < result.name:
            state: dict[str, Any] | None = known[1]
        else:
            path = last_state(result)
            state = thaw(path.read_bytes()) if path else None
        stack = _required(Stack(build_stack(job.stack), job.space), order, job)
        self.client = ClientSide(
            stack, job.job, Round(job.round, job.rounds), self.device, view.spec, steps=job.recipe.steps, lr=job.recipe.lr, down=view.down,
            state=state,
        )  # fmt: skip
        self.trainer = self.trains_with(
            base, task, job, self.client, train, lambda s, v: progress({"step": s, "steps": job.recipe.steps, "loss": v})
        )
        # What is trained here and never leaves takes the place of what arrived.
        self.anchor = {**view.trained(), **{k: t for k, t in self.client.kept.items() if k in view.spec.shapes()}}
        self.start = self.client.begin(self.anchor)
        base.place(view.spec, view.tensors)
        for name, method in stack.using("attach"):
            method.attach(base, view.spec, self.client.context(name))

    def cache(self, held: Examples, room_mb: float) -> None:
        """Keep what the unchanging lower layers put out, where that is valid and pays; the report says what came of it."""
        base, recipe, examples = self.base, self.job.recipe, [*self.trainer.examples, *held[: self.job.recipe.evaluate]]
        told = ""
        at = 0
        if base.core is None or any("ids" not in e for e in examples[:1]):
            told = "this architecture runs on transformers' modules"
        elif users := [n for hook in ("batch", "attach") for n, _ in self.client.stack.using(hook)]:
            told = f"`{users[0]}` changes what the model sees"
        else:
            draws = recipe.steps * recipe.batch + 2 * recipe.probe + len(held[: recipe.evaluate])
            own = trained_from(base.sites, base.core.kind.layers)
            at, told = choose(own, min(own, recipe.floor), draws, len(examples), recipe.keeps, self.job.rounds)
        if at:
            for e in examples:
                e.setdefault("key", example_key(e["ids"]))
            folder = Path(self.order.result).parent / "activations"
            told = base.cache(at, [e["ids"] for e in examples], room_mb, folder, self.order.cache_mb)
        if told:
            base.prefix = None
        self.told["cache"] = told or f"layers below {at}"

    def lighten(self) -> None:
        """What the cache made superfluous leaves memory. Its counts go beside the update: they depend on restarts, the update must not."""
        if (prefix := self.base.prefix) is not None:
            store = prefix.store
            self.counts = {"cache_made": store.made, "cache_found": store.hits, "cache_written_mb": round(store.written / 1e6, 2)}
            store.made = store.hits = store.written = 0
            self.base.lighten()

    def evaluate(self, held: Examples) -> None:
        """Measure the version as it arrived on examples that are never trained on."""
        head = {k: as_tensor(self.view.tensors[k]) for k in self.view.spec.dense}
        with self.watch("evaluate"):
            self.told["held"] = self.trainer.measure(held[: self.job.recipe.evaluate], head)
        if job_samples := self.job.task.samples if self.job.purpose == "install" or self.job.round == 0 else []:
            with self.watch("samples"):
                self.told["samples"] = self.trainer.samples(job_samples)
        with self.watch("probe"):
            self._probe("loss_before", head)

    def _probe(self, name: str, head: dict[str, Any] | None = None) -> None:
        """Loss on the same few examples, before and after: what the tuner is rewarded by."""
        if self.job.purpose == "train":
            sums = self.trainer.measure(self.trainer.examples[: self.job.recipe.probe], head)
            self.told[name] = sums["loss"] / max(1.0, sums["count"])

    def install(self) -> Tensors:
        """Put the version in place for applications; nothing is trained, and nothing but the report leaves."""
        self._publish({**self.view.tensors, **self.client.serve(self.start)})
        return {}

    def train(self) -> Tensors:
        """Train, and give what leaves the device."""
        with self.watch("train"):
            trained = self.trainer.run(self.start, self.view.down)
        with self.watch("probe"):
            self._probe("loss_after")
        delta = {k: t - self.view.tensors[k] for k, t in trained.items()}
        self.client.keep({k: t for k, t in trained.items() if not self.client.stack.travels(k, self.client.round)})
        sent = self.client.send(delta)
        served = self.client.serve({**self.anchor, **trained}) if self.client.stack.using("serve") else {}
        self._publish({**self.view.tensors, **self.client.kept, **served})
        self.told |= {"steps": self.job.recipe.steps, "examples": len(self.trainer.examples)}
        tensors = {f"d/{k}": t for k, t in sent.items()} | self._importance()
        return tensors | {f"x/{n}/{k}": t for n, up in self.client.up.items() for k, t in up.items()}

    def _importance(self) -> Tensors:
        """What heads and channels are worth here, in the round in which the job asks for it; nothing from a base that is cut already."""
        if (
            not self.job.recipe.score
            or self.job.recipe.prune
            or self.base.core is None
            or any(m.releases for m in self.client.stack.methods.values())
        ):
            return {}
        probe = self.trainer.examples[: self.job.recipe.probe]
        with self.watch("importance"):
            return importance.scores(self.base, read_card(Path(self.order.model)), self.trainer.last, [self.trainer._collate(probe)])

    def _publish(self, tensors: Tensors) -> None:
        self.serves = partial(current.publish, Path(self.order.home), self.job, self.view, tensors, self.base.transposed)

    def commit(self, tensors: Tensors) -> None:
        """Update, state and signature in one folder, put in its place in one step."""
        update = encode(tensors, self.told)
        blob = blob_of(update, self.order.chunk)
        signed = manifest(self.job.job, self.job.round, self.device, blob.digest)
        signature = self.key.sign(signed)
        cost = {**self.watch.seconds, **self.counts, "peak_mb": system.peak_rss_mb()}
        meta = Meta(self.job.job, self.job.round, blob, signature, cost, self.order.inline)
        state = self.client.saved()
        commit(Path(self.order.result), update, freeze(state), meta)
        self.state = (state_file(Path(self.order.result)), state)


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
        """Do what the order says and leave the result in its folder. Raises RankfleetError with the reason."""
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
        local = self.round(order, job, view, base, task, train, watch, progress, known)
        local.told["skipped"] = shard.unknown
        local.trainer.micro = plan.micro
        local.trainer.checkpoint = Checkpoint(checkpoint_file(Path(order.result)), digest_of(order.envelope), system.halted)
        if base.core is not None:
            base.core.checkpointing = plan.checkpointing
        if job.purpose == "train":
            local.cache(held, order.budget_mb - plan.memory_mb)
        else:
            base.prefix = None
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
        """How a batch is carried out in the memory that there is. Refuses before anything is allocated. Raises Refused or DoesNotFit."""
        card = self._card(Path(order.model))
        if card.digest != job.model_digest:
            raise Refused(
                f"model `{job.model}` in {order.model} has digest {card.digest[:12]}, the job wants {job.model_digest[:12]}",
                "put the same files on every device",
            )
        placement = {k: p.rank for k, p in spec.pairs.items() if p.trained}
        recipe, head = job.recipe, sum(int(np.prod(d.shape)) for d in spec.dense.values())
        plan = step_plan(card, placement, recipe.prune, recipe.bits, recipe.batch, job.task.max_length, head, order.budget_mb)
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
        in_half = half(order.kernel_ms, self._card(Path(order.model)).hidden)
        key = f"{job.model_digest} {job.recipe.bits} {masks} {names} {job.task.kind == 'causal_lm'} {in_half}"
        if self._base is None or self._base[0] != key:
            self._base = None
            self._base = (key, self._opened(order, job, names, view, in_half))
        return self._base[1]

    def _opened(self, order: Order, job: Assignment, names: list[str], view: View, in_half: bool) -> Base:
        """From the shelf of prepared bases, where the disk has room for one; else made in memory."""
        args = (Path(order.model), names, job.recipe.bits, view.masks, job.task.kind == "causal_lm")
        if order.shelf_mb > 0:
            shelf = Shelf(Path(order.home) / "bases", order.shelf_mb)
            try:
                base = Base(*args, half=in_half, shelf=shelf, digest=job.model_digest)
                self.written_mb += shelf.written / 1e6
                return base
            except OSError as error:
                log.warning("the prepared base cannot be kept on disk (%s); it is made in memory", error)
        return Base(*args, half=in_half, digest=job.model_digest)

    def _examples(self, order: Order, job: Assignment) -> tuple[TaskEngine, Examples, Examples, Shard]:
        key = repr((order.dataset, job.task, order.model))
        if self._data is None or self._data[0] != key:
            task = engine(job.task, order.model)
            shard = Shard(order.dataset, job.task.dataset, task.fields, job.task.labels, getattr(task, "optional", ()))
            train, held = task.encode(shard.train), task.encode(shard.held)
            if not train:
                raise Refused(f"dataset `{job.task.dataset}`: no example has an answer to learn", "map `output` under its `columns`")
            shard.unknown += getattr(task, "skipped", 0)
            self._data = (key, (task, train, held, shard))
        return self._data[1]


def _verified(order: Order) -> Assignment:
    """The assignment, if the coordinator of this fleet signed it. Raises WireError."""
    envelope = unpack(order.envelope)
    if not signed_by(identity.known(Path(order.home)).coordinator, envelope.signature, envelope.body):
        raise WireError("the assignment is not signed by this fleet's coordinator", "enrol the device again")
    return read_assignment(envelope.body)


def _required(stack: Stack, order: Order, job: Assignment) -> Stack:
    """The job's stack with what the owner requires behind it. Raises Refused where that cannot be."""
    if not order.require:
        return stack
    try:
        extra = build_stack(list(order.require))
        if undoes := [n for n, m in extra.items() if overrides(m, "receive")]:
            raise Refused(f"the owner requires `{undoes[0]}`, which the coordinator would have to undo", "ask for it in the job")
        return Stack({**stack.methods, **{n: m for n, m in extra.items() if n not in stack.methods}}, job.space)
    except Conflict as error:
        raise Refused(f"the owner's requirements and the job exclude each other: {error}") from None
