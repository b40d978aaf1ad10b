"""One assignment on one device: measure, cache, train, encode, commit."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from rankfleet.federated.contract.catalogue import build_stack
from rankfleet.federated.contract.client_side import ClientSide
from rankfleet.federated.contract.method import overrides
from rankfleet.federated.contract.stack import Stack
from rankfleet.federated.contract.tensors import Tensors
from rankfleet.federated.errors import Conflict, HookError, Refused
from rankfleet.federated.wire.frame import encode, freeze, thaw
from rankfleet.federated.wire.messages import Assignment, manifest
from rankfleet.federated.wire.transfer import blob_of
from rankfleet.profiles.card import read_card

from ..machine import system
from ..model import Base, importance
from ..model.cache.activations import example_key
from ..model.cache.prefix import choose
from ..order import Meta, Order, commit, last_state, state_file
from ..tasks import TaskEngine
from ..trust import identity
from . import serving
from .stopwatch import Stopwatch
from .trainer import Examples, Trainer
from .view import View

Progress = Callable[[dict[str, Any]], None]

PUBLIC = frozenset({"version", "bits", "cache", "held", "samples", "steps", "examples"})
"""All that a report says where the stack has a release (docs/threat-model.md): nothing that training
examples were put into."""


class LocalRound:
    """One assignment on one device, with everything prepared. `told` becomes the report that travels with
    the update."""

    trains_with: Any = Trainer

    def __init__(
        self, order: Order, job: Assignment, view: View, base: Base, task: TaskEngine, train: Examples,
        watch: Stopwatch,
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
        if view.masks and (
            users := [n for hook in ("tensors", "express", "attach") for n, _ in stack.using(hook)]
        ):
            raise Refused(
                f"`{users[0]}` works on whole maps, and this round's are pruned",
                "set `arms: {prune: [0]}` in the job",
            )
        self.client = ClientSide(
            stack, job.job, stack.at(job.round, job.rounds), self.device, view.spec, steps=job.recipe.steps,
            lr=job.recipe.lr,
            down=view.down, state=state,
        )  # fmt: skip
        self.trainer = self.trains_with(
            base,
            task,
            job,
            self.client,
            train,
            lambda s, v: progress({"step": s, "steps": job.recipe.steps, "loss": v}),
        )
        self.probe = train[: job.recipe.probe]
        self.held: Examples = []
        # What stays here takes the place of what arrived.
        self.received = {**view.trained(), **self.client.own()}
        self.start = self.client.begin(self.received)
        base.place(view.spec, view.tensors, view.carried())
        self.trainer.prepare(view.tensors, self.start, view.down)

    def cache(self, held: Examples, room_mb: float, disk_mb: float) -> None:
        """Keep what the unchanging lower layers put out, where that is valid and pays; the report says
        what came of it."""
        base, recipe, examples = (
            self.base,
            self.job.recipe,
            [*self.trainer.examples, *held[: self.job.recipe.evaluate]],
        )
        told = ""
        at = 0
        if base.core is None:
            told = "this architecture runs on transformers' modules"
        elif any("ids" not in e for e in examples[:1]):
            told = "examples are no texts"
        elif users := [n for hook in ("batch", "attach", "data") for n, _ in self.client.stack.using(hook)]:
            told = f"`{users[0]}` changes what the model sees"
        else:
            draws = recipe.steps * recipe.batch + 2 * recipe.probe + len(held[: recipe.evaluate])
            made = bool(
                self.client.stack.using("express")
            )  # from tensors that may be trained where the pair is not
            own = min(
                (p.layer for p in self.view.spec.pairs.values() if p.trained or made),
                default=base.core.kind.layers,
            )
            at, told = choose(
                own, min(own, recipe.floor), draws, len(examples), recipe.keeps, self.job.rounds
            )
        if at:
            for e in examples:
                e.setdefault("key", example_key(e["ids"]))
            folder = Path(self.order.result).parent / "activations"
            told = base.cache(at, [e["ids"] for e in examples], room_mb, folder, disk_mb)
        if told:
            base.prefix = None
        self.told["cache"] = told or f"layers below {at}"

    def lighten(self) -> None:
        """What the cache made superfluous leaves memory. Its counts go beside the update: they depend on
        restarts, the update must not."""
        if (prefix := self.base.prefix) is not None:
            store = prefix.store
            self.counts = {
                "cache_made": store.made,
                "cache_found": store.hits,
                "cache_written_mb": round(store.written / 1e6, 2),
            }
            store.made = store.hits = store.written = 0
            self.base.lighten()

    def evaluate(self, held: Examples) -> None:
        """Measure the version as it arrived on examples that are never trained on, and let methods look at
        it."""
        self.held = held[: self.job.recipe.evaluate]
        for ctx in self.trainer.contexts.values():
            ctx.held = held
        with self.watch("evaluate"):
            self.told["held"] = self.trainer.measure(self.held)
        if (
            job_samples := self.job.task.samples
            if self.job.purpose == "install" or self.job.round == 0
            else []
        ):
            with self.watch("samples"):
                self.told["samples"] = self.trainer.samples(job_samples)
        with self.watch("probe"):
            self._probe("loss_before")
        if self.job.purpose == "train":
            self.trainer.look("arrived")

    def _probe(self, name: str) -> None:
        """Loss on the same few training examples, before and after: what the tuner is rewarded by. Not
        beside a release."""
        if self.job.purpose == "train" and not self.client.stack.releases:
            sums = self.trainer.measure(self.probe)
            self.told[name] = sums["loss"] / max(1.0, sums["count"])

    def install(self) -> Tensors:
        """Put the version in place for applications; nothing is trained, and nothing but the report
        leaves."""
        self._serve(self.client.serve(self.start))
        return {}

    def train(self) -> Tensors:
        """Train, and give what leaves the device."""
        if self.client.round.leg != "train":
            return self._answer()
        with self.watch("train"):
            trained = self.trainer.train()
        with self.watch("probe"):
            self._probe("loss_after")
        importance_here = self._importance()
        self.trainer.look("trained")
        delta = {k: t - self.view.tensors[k] for k, t in trained.items()}
        self.client.keep(trained)
        sent = self.client.send(delta)
        served = self.client.serve({**self.received, **trained}) if self.client.stack.using("serve") else {}
        self._serve({**self.client.own(), **served})
        self.told |= {"steps": self.job.recipe.steps, "examples": len(self.trainer.examples)}
        return {f"d/{k}": t for k, t in sent.items()} | importance_here | self._extras()

    def _answer(self) -> Tensors:
        """What the device says in a leg in which nothing is trained."""
        self.trainer.answer(self.view.down)
        self.told |= {"steps": 0, "examples": len(self.trainer.examples)}
        return self._extras()

    def _extras(self) -> Tensors:
        """What methods send along. Raises HookError beside a release, for who does not say that it is not
        made of examples."""
        for name, method in self.client.stack.methods.items() if self.client.stack.releases else ():
            if self.client.up[name] and not (method.releases or method.codes or method.tells == "public"):
                what = f"sends `{min(self.client.up[name])}` along with an update that was made private"
                raise HookError(
                    name,
                    "send",
                    what,
                    'it may if it is not made of examples and its class says `tells = "public"`',
                )
        return {f"x/{n}/{k}": t for n, up in self.client.up.items() for k, t in up.items()}

    def _serve(self, served: Tensors) -> None:
        """Let applications have the version with `served` in its place; where methods make it personal,
        measure it as it is served."""
        stack, tensors = self.client.stack, {**self.view.tensors, **served}
        if self.held and not stack.releases and (stack.using("serve") or self.client.own()):
            with self.watch("evaluate"):
                self.told["personal"] = self.trainer.measure(self.held, tensors)
        shown, attached = stack.express(tensors, self.view.spec, np), dict(stack.using("attach"))
        self.serves = partial(
            serving.publish, Path(self.order.home), self.job, self.view, shown, self.base.transposed, attached
        )

    def _importance(self) -> Tensors:
        """What heads and channels are worth here, in the round in which the job asks for it; nothing from
        a base that is cut already."""
        if (
            not self.job.recipe.score
            or self.job.recipe.prune
            or self.base.core is None
            or self.client.stack.releases
        ):
            return {}
        with self.watch("importance"):
            return importance.scores(
                self.base,
                read_card(Path(self.order.model)),
                self.trainer.last,
                [self.trainer.collate(self.probe)],
            )

    def commit(self, tensors: Tensors) -> None:
        """Update, state and signature in one folder, put in its place in one step."""
        report = {k: v for k, v in self.told.items() if k in PUBLIC or not self.client.stack.releases}
        update = encode(tensors, report)
        blob = blob_of(update, self.order.chunk)
        signed = manifest(self.job.job, self.job.round, self.device, blob.digest)
        signature = self.key.sign(signed)
        cost = {**self.watch.seconds, **self.counts, "peak_mb": system.peak_rss_mb()}
        meta = Meta(self.job.job, self.job.round, blob, signature, cost, self.order.inline)
        state = self.client.saved()
        commit(Path(self.order.result), update, freeze(state), meta)
        self.state = (state_file(Path(self.order.result)), state)


def _required(stack: Stack, order: Order, job: Assignment) -> Stack:
    """The job's stack with what the owner requires behind it. Raises Refused where that cannot be."""
    if not order.require:
        return stack
    try:
        extra = build_stack(list(order.require))
        if undoes := [n for n, m in extra.items() if overrides(m, "receive")]:
            raise Refused(
                f"the owner requires `{undoes[0]}`, which the coordinator would have to undo",
                "ask for it in the job",
            )
        return Stack(
            {**stack.methods, **{n: m for n, m in extra.items() if n not in stack.methods}}, job.space
        )
    except Conflict as error:
        raise Refused(f"the owner's requirements and the job exclude each other: {error}") from None
