"""The worker's way through one order: check, load, measure, train, encode, commit. NumPy and torch live here."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch

from federated.catalogue import build_stack
from federated.errors import Conflict, DoesNotFit, Refused, WireError
from federated.messages import Assignment, manifest, read_assignment, unpack
from federated.method import Round, overrides
from federated.spec import Spec
from federated.stack import ClientSide, Stack
from federated.tensors import Tensors
from federated.transfer import blob_of
from federated.wire import encode, freeze, open_frame, thaw
from profiles.card import ModelCard, read_card
from profiles.cost import memory_mb

from . import current, identity, system
from .adapter import as_tensor
from .data import Shard
from .model import Base
from .order import Meta, Order, commit, last_state
from .tasks import TaskEngine, engine
from .trainer import Examples, Stopwatch, Trainer

Progress = Callable[[dict[str, Any]], None]


class View:
    """What arrived from the coordinator for one round: spec, tensors, masks, and extras of methods."""

    def __init__(self, blobs: dict[str, str]) -> None:
        tensors, meta = open_frame(Path(blobs["view"]), finite=True)
        spec = msgspec.convert(meta, Spec)
        frozen, below = open_frame(Path(blobs["frozen"]), finite=True) if "frozen" in blobs else ({}, None)
        pairs = {**spec.pairs, **(msgspec.convert(below, Spec).pairs if below else {})}
        self.spec = Spec(pairs, spec.dense)
        self.masks = {k: np.array(t) for k, t in open_frame(Path(blobs["masks"]))[0].items()} if "masks" in blobs else {}
        self.down: dict[str, Tensors] = {}
        self.tensors: Tensors = {}
        for name, array in {**frozen, **tensors}.items():
            if name.startswith("x/"):
                _, method, key = name.split("/", 2)
                self.down.setdefault(method, {})[key] = np.array(array)
            else:
                self.tensors[name] = array.astype(np.float32)

    def trained(self) -> Tensors:
        """The part of the view that is trained here."""
        return {k: self.tensors[k] for k in self.spec.shapes()}


class Worker:
    """Keeps what costs time between rounds: the prepared base, the encoded examples, the model card."""

    def __init__(self) -> None:
        self._base: tuple[str, Base] | None = None
        self._data: tuple[str, tuple[TaskEngine, Examples, Examples, Shard]] | None = None
        self._cards: dict[str, ModelCard] = {}

    def run(self, order: Order, progress: Progress) -> None:
        """Do what the order says and leave the result in its folder. Raises RankfleetError with the reason."""
        job = _verified(order)
        with system.slot(order.slots):
            torch.set_num_threads(order.threads)
            self._round(order, job, progress)

    def _round(self, order: Order, job: Assignment, progress: Progress) -> None:
        watch, device = Stopwatch(), identity.load(Path(order.home)).device
        view = View(order.blobs)
        with watch("load"):
            self._fits(order, job, view.spec)
            base = self._prepared(order, job, view)
            task, train, held, shard = self._examples(order, job)
        stack = Stack(build_stack(job.stack), job.space)
        state = last_state(Path(order.folder))
        client = ClientSide(
            Stack(_required(stack, order, job).methods, job.space),
            job.job,
            Round(job.round, job.rounds),
            device,
            view.spec,
            steps=job.recipe.steps,
            lr=job.recipe.lr,
            down=view.down,
            state=thaw(state.read_bytes()) if state else None,
        )
        trainer = Trainer(base, task, job, client, train, lambda s, v: progress({"step": s, "steps": job.recipe.steps, "loss": v}))
        head = {k: as_tensor(view.tensors[k]) for k in view.spec.dense}
        self._attach(base, view, client)
        with watch("evaluate"):
            told = {"held": trainer.measure(held[: job.recipe.evaluate], head), "version": job.version}
        if job.purpose == "install":
            served = client.serve(client.begin(view.trained()))
            current.publish(Path(order.home), job, view, {**view.tensors, **served})
            _commit_report(order, job, device, told, client)
            return
        self._train(order, job, view, client, trainer, head, told, watch, device, shard)

    @staticmethod
    def _attach(base: Base, view: View, client: ClientSide) -> None:
        """Put the adapter into the model: as low-rank pairs, then whatever a method of the stack adds."""
        base.place(view.spec, view.tensors)
        for name, method in client.stack.using("attach"):
            client.begin(view.trained())
            base.model = method.attach(base.model, view.spec, client.context(name))

    def _train(
        self,
        order: Order,
        job: Assignment,
        view: View,
        client: ClientSide,
        trainer: Trainer,
        head: dict[str, Any],
        told: dict[str, Any],
        watch: Stopwatch,
        device: str,
        shard: Shard,
    ) -> None:
        kept: Tensors = client.kept
        anchor = {**view.trained(), **{k: t for k, t in kept.items() if k in view.tensors}}
        start = client.begin(anchor)
        probe = trainer.examples[: job.recipe.probe]
        with watch("probe"):
            before = trainer.measure(probe, head)
        with watch("train"):
            trained = trainer.run(start, view.down)
        with watch("probe"):
            after = trainer.measure(probe)
        delta = {k: trained[k] - view.tensors[k] for k in trained}
        client.keep({k: trained[k] for k in trained if not client.stack.travels(k, client.round)})
        sent = client.send(delta)
        count = max(1.0, before["count"])
        told |= {
            "loss_before": before["loss"] / count,
            "loss_after": after["loss"] / count,
            "steps": job.recipe.steps,
            "examples": len(trainer.examples),
            "skipped": shard.unknown,
            "seconds": watch.seconds,
            "peak_mb": system.peak_rss_mb(),
            "bits": job.recipe.bits,
            "norm": float(np.sqrt(sum(float(np.vdot(t, t)) for t in delta.values()))),
        }
        tensors = {f"d/{k}": t for k, t in sent.items()}
        tensors |= {f"x/{n}/{k}": t for n, up in client.up.items() for k, t in up.items()}
        served = client.serve({**anchor, **trained})
        current.publish(Path(order.home), job, view, {**view.tensors, **served} if client.stack.using("serve") else view.tensors)
        _commit(order, job, device, encode(tensors, told), client, told)

    def _fits(self, order: Order, job: Assignment, spec: Spec) -> None:
        """Refuse before anything is allocated. Raises Refused."""
        card = self._card(Path(order.model))
        if card.digest != job.model_digest:
            raise Refused(
                f"model `{job.model}` in {order.model} has digest {card.digest[:12]}, the job wants {job.model_digest[:12]}",
                "put the same files on every device",
            )
        placement = {k: p.rank for k, p in spec.pairs.items() if p.trained}
        need = memory_mb(
            card,
            placement,
            job.recipe.prune,
            job.recipe.bits,
            job.recipe.batch,
            job.task.max_length,
            sum(int(np.prod(d.shape)) for d in spec.dense.values()),
        )
        if need > order.budget_mb:
            raise DoesNotFit(
                f"the arm needs {need:.0f} MB, this device allows {order.budget_mb:.0f} MB", "lower rank or depth, prune, or use fewer bits"
            )

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
        key = f"{job.model_digest} {job.recipe.bits} {masks} {names}"
        if self._base is None or self._base[0] != key:
            self._base = None
            self._base = (key, Base(Path(order.model), names, job.recipe.bits, view.masks))
        return self._base[1]

    def _examples(self, order: Order, job: Assignment) -> tuple[TaskEngine, Examples, Examples, Shard]:
        key = repr((order.dataset, job.task, order.model))
        if self._data is None or self._data[0] != key:
            task = engine(job.task, order.model)
            shard = Shard(order.dataset, job.task.dataset, task.fields, job.task.labels)
            self._data = (key, (task, task.encode(shard.train), task.encode(shard.held), shard))
        return self._data[1]


def _verified(order: Order) -> Assignment:
    """The assignment, if the coordinator of this fleet signed it. Raises WireError."""
    from cryptography.exceptions import InvalidSignature
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

    envelope = unpack(Path(order.envelope).read_bytes())
    public = Ed25519PublicKey.from_public_bytes(identity.load(Path(order.home)).coordinator)
    try:
        public.verify(envelope.signature, envelope.body)
    except InvalidSignature:
        raise WireError("the assignment is not signed by this fleet's coordinator", "enrol the device again") from None
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


def _commit(order: Order, job: Assignment, device: str, update: bytes, client: ClientSide, told: dict[str, Any]) -> None:
    blob = blob_of(update, order.chunk)
    signature = identity.private_key(Path(order.home)).sign(manifest(job.job, job.round, device, blob.digest))
    commit(Path(order.folder), update, freeze(client.saved()), Meta(job.job, job.round, blob, signature, told))


def _commit_report(order: Order, job: Assignment, device: str, told: dict[str, Any], client: ClientSide) -> None:
    """An installation has no update, only what was measured."""
    _commit(order, job, device, encode({}, told), client, told)
