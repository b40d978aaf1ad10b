"""From a version and the tuner's arms to what each device is told: spec, view, frozen layers, masks,
recipe."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from rankfleet.bandit.arms import Arm, expand
from rankfleet.bandit.policy import Choice
from rankfleet.coordinator.jobs.plan import Plan
from rankfleet.federated.contract.contexts import Adapter, Tensor
from rankfleet.federated.contract.server_side import ServerSide
from rankfleet.federated.contract.spec import Dense, Pair, Spec
from rankfleet.federated.contract.stack import seed_of
from rankfleet.federated.contract.tensors import Array, Tensors
from rankfleet.federated.contract.update import LowRank, Masks
from rankfleet.federated.errors import WireError
from rankfleet.federated.program.files import digest_of
from rankfleet.federated.wire.frame import encode
from rankfleet.federated.wire.messages import Assignment, Blob, ModelSource, Recipe
from rankfleet.profiles.card import Module
from rankfleet.profiles.memory import memory_mb

from ..exchange.downloads import Blobs
from ..store.versions import Registry, Version, carry_tensors
from . import importance as channels
from . import views

SCORE_ROUND = 3
"""The round in which devices say what heads and channels are worth to them: before pruning first grows."""


class Planner:
    """One per job. Views and masks are made once per class of devices and shared by digest."""

    def __init__(
        self,
        job: str,
        plan: Plan,
        model_folder: Path,
        registry: Registry,
        blobs: Blobs,
        source: ModelSource | None = None,
        warrant: bytes | None = None,
    ) -> None:
        self.job, self.plan, self.registry, self.blobs, self.source = job, plan, registry, blobs, source
        self.warrant = warrant
        self.prunes, self.ranked = max(plan.spec.arms.prune) > 0, False
        self.scores = (
            channels.importance(model_folder, plan.card) if self.prunes else channels.Importance({}, {})
        )
        self.own: dict[str, dict[str, Array]] = {}
        """Private masks: what each device said that its heads and channels are worth to it, as it came."""
        self._masks: dict[tuple[float, str], Masks] = {}
        self._frozen: tuple[int, Version] | None = None
        self._placements: dict[str, dict[str, int]] = {}
        self._needs: dict[tuple[Any, ...], float] = {}
        self._shared: tuple[int, dict[tuple[Any, ...], dict[str, Blob]]] = (-1, {})
        self.half = plan.stack.space == "product" and bool(plan.stack.methods)
        self._added: dict[str, Tensor] | None = None

    def first_version(self, rank: int, server: ServerSide | None = None) -> Version:
        """Version 0: empty factors (seeded rows of A in factor space), a small seeded head, and what
        methods add."""
        seed = self.plan.spec.seed
        pairs = {}
        for m in self.plan.modules:
            r = min(rank, m.out, m.in_)
            pairs[m.name] = (
                views.fresh_factors(m.out, m.in_, r, seed, m.name)
                if self.plan.stack.space == "factors"
                else LowRank(np.zeros((m.out, r)), np.zeros((r, m.in_)))
            )
        rng = np.random.default_rng(seed_of(seed, "head"))
        dense: Tensors = {
            k: (rng.standard_normal(s) * (0.02 if len(s) > 1 else 0.0)).astype(np.float32)
            for k, s in sorted(self.plan.heads.items())
        }
        added = self.added(server, pairs, dense) if server else {}
        return Version(0, pairs, {**dense, **{k: first_value(t.value) for k, t in added.items()}}, {}, {})

    def added(self, server: ServerSide, pairs: Mapping[str, LowRank], heads: Tensors) -> dict[str, Tensor]:
        """What methods add to the adapter; asked once, and again after a restart: `Method.tensors` is a
        function of the job."""
        if self._added is None:
            before, server.adapter = server.adapter, Adapter(pairs, heads)
            scale = self.plan.spec.adapter.scale
            maps = {
                m.name: Pair(m.layer, m.out, m.in_, 0, scale, m.out, m.in_, "") for m in self.plan.modules
            }
            self._added = server.tensors(Spec(maps, {}))
            server.adapter = before
        return self._added

    def constants(self, version: Version, server: ServerSide) -> set[str]:
        """Tensors of methods that nobody trains."""
        heads = {k: t for k, t in version.dense.items() if k in self.plan.heads}
        return {k for k, t in self.added(server, version.pairs, heads).items() if not t.trained}

    def rank(self, scores: channels.Importance) -> None:
        """Another order of heads and channels; what was cut by the old one is cut anew."""
        self.scores, self.ranked = scores, True
        self._masks.clear()

    def tell(self, device: str, scores: dict[str, Array]) -> None:
        """What heads and channels are worth to a device; kept where masks are private."""
        if self.plan.spec.arms.masks == "private" and scores:
            self.own[device] = scores
            self._masks.clear()

    def masks(self, ratio: float, device: str) -> Masks:
        """Kept channels of a device at a pruning ratio, by its own order where masks are private and it
        told one."""
        key = (ratio, device if device in self.own else "")
        if key not in self._masks:
            order = (
                channels.agreed(self.plan.card, self.scores, [(1.0, self.own[device])])
                if key[1]
                else self.scores
            )
            self._masks[key] = channels.masks(self.plan.card, order, ratio)
        return self._masks[key]

    def asks(self, number: int, device: str, prune: float) -> bool:
        """Should a device say what heads and channels are worth? All in one round; with private masks,
        whoever has not yet and is whole."""
        if not self.prunes:
            return False
        late = (
            self.plan.spec.arms.masks == "private"
            and number > SCORE_ROUND
            and device not in self.own
            and not prune
        )
        return number == SCORE_ROUND or late

    def assign(
        self,
        version: Version,
        number: int,
        device: str,
        choice: Choice,
        server: ServerSide,
        inline: bool = False,
    ) -> Assignment:
        """One device's assignment; views that are new are added to `version.views`."""
        arm, spec = choice.arm, self.plan.spec
        placement = self._expanded(arm.placement)
        ask = server.plan(
            {
                "placement": dict(placement),
                "rank": max(placement.values()),
                "steps": arm.steps,
                "lr": spec.training.lr,
            },
            device,
            number,
        )
        placement = {m: min(r, int(ask["rank"])) for m, r in ask["placement"].items()}
        score = self.asks(number, device, arm.prune)
        recipe = self._recipe(version.number, arm, placement, int(ask["steps"]), float(ask["lr"]), score)
        return self._assignment(
            version, number, device, arm, placement, recipe, server, choice.why, "train", inline
        )

    def _expanded(self, rule: str) -> dict[str, int]:
        if rule not in self._placements:
            self._placements[rule] = expand(rule, self.plan.card, self.plan.modules)
        return self._placements[rule]

    def install(self, version: Version, device: str, arm: Arm, server: ServerSide) -> Assignment:
        """The final version for one device: nothing is trained, it is measured and put in place."""
        placement = self._expanded(arm.placement)
        recipe = self._recipe(version.number, arm, placement, 1, self.plan.spec.training.lr)
        return self._assignment(
            version, server.total, device, arm, placement, recipe, server, "the final version", "install"
        )

    def _recipe(
        self, version: int, arm: Arm, placement: Mapping[str, int], steps: int, lr: float, score: bool = False
    ) -> Recipe:
        t = self.plan.spec.training
        need = self._need(arm, placement)
        every, floor = self.plan.spec.frozen_every, self.plan.floor
        keeps = every - version % every
        plain = self.plan.stack.plain
        optimizer, clip, warmup = ("sgd", 0.0, 0.0) if plain else (t.optimizer or "adamw", t.clip, t.warmup)
        return Recipe(
            arm.bits, arm.batch, steps, lr, optimizer, arm.prune, t.probe, t.evaluate, need, keeps, floor,
            score, clip, warmup
        )  # fmt: skip

    def _need(self, arm: Arm, placement: Mapping[str, int]) -> float:
        """MB that a device needs for the maps that it holds, with heads and what methods add."""
        key = (tuple(placement.items()), arm.prune, arm.bits, arm.batch)
        if key not in self._needs:
            length, dense = self.plan.spec.task.max_length, self.plan.head_size + self._more
            placed = {m: max(1, r) for m, r in placement.items()}
            self._needs[key] = round(
                memory_mb(self.plan.card, placed, arm.prune, arm.bits, arm.batch, length, dense), 2
            )
        return self._needs[key]

    @property
    def _more(self) -> int:
        """Numbers that methods add to the adapter."""
        return sum(t.value.size for t in (self._added or {}).values())

    def _assignment(
        self,
        version: Version,
        number: int,
        device: str,
        arm: Arm,
        placement: Mapping[str, int],
        recipe: Recipe,
        server: ServerSide,
        why: str,
        purpose: Any,
        inline: bool = False,
    ) -> Assignment:
        blobs, held = self._blobs(version, number, device, arm, placement, server, purpose == "install")
        if held != placement:
            recipe = msgspec.structs.replace(recipe, memory_mb=self._need(arm, held))
        spec = self.plan.spec
        return Assignment(
            job=self.job,
            round=number,
            rounds=server.total,
            version=version.number,
            purpose=purpose,
            model=spec.model,
            model_digest=self.plan.card.digest,
            task=self.plan.task(),
            stack=list(msgspec.to_builtins(spec.stack)),
            space=self.plan.stack.space,
            recipe=recipe,
            blobs=blobs,
            seed=seed_of(spec.seed, self.job) % 2**31,
            say=f"{arm.text()}: {why}",
            inline=inline,
            source=self.source,
        )

    def _blobs(
        self,
        version: Version,
        number: int,
        device: str,
        arm: Arm,
        placement: Mapping[str, int],
        server: ServerSide,
        complete: bool,
    ) -> tuple[dict[str, Blob], dict[str, int]]:
        """What a device fetches, made once for all that get the same; and the maps that it holds: `offer`
        may leave some out."""
        whose = device if arm.prune and device in self.own else ""
        key = (version.number, tuple(placement.items()), arm.prune, complete, whose)
        if self._shared[0] != version.number:
            self._shared = (version.number, {})
        if key in self._shared[1]:
            return self._shared[1][key], dict(placement)
        masks = self.masks(arm.prune, device)
        view, spec = self._view(version, number, device, placement, masks, server)
        held = {m: r for m, r in placement.items() if m in spec.pairs}
        blobs = {"view": view} | self._fixed_blobs(version, placement, masks, server, complete)
        if not server.stack.using("offer") and server.leg(number) == "train":
            self._shared[1][key] = blobs
        return blobs, held

    def _fixed_blobs(
        self, version: Version, placement: Mapping[str, int], masks: Masks, server: ServerSide, complete: bool
    ) -> dict[str, Blob]:
        """What is the same for many devices or rounds, and so travels once: each keeps its digest as long
        as it says the same."""
        blobs = {}
        if frozen := self._below(version, placement, masks, complete=complete):
            blobs["frozen"] = frozen
        if constants := {k: version.dense[k] for k in sorted(self.constants(version, server))}:
            blobs["constants"] = self.blobs.put(encode(constants))
        if version.carry:
            blobs["carry"] = self.blobs.put(
                encode({k: t.astype(np.float32) for k, t in carry_tensors(version.carry).items()})
            )
        if self.warrant:
            blobs["warrant"] = self.blobs.put(self.warrant)
        if masks:
            blobs["masks"] = self.blobs.put(encode({k: t.astype(np.int32) for k, t in masks.items()}))
        return blobs

    def _view(
        self,
        version: Version,
        number: int,
        device: str,
        placement: Mapping[str, int],
        masks: Masks,
        server: ServerSide,
    ) -> tuple[Blob, Spec]:
        """What a device trains, as methods offer it, with their extras; and what it consists of, constants
        included."""
        tensors: Tensors = {}
        pairs: dict[str, Pair] = {}
        for m in self.plan.modules:
            if m.name in placement:
                rank = placement[m.name]
                pairs[m.name], cut = self._cut(
                    m, self.view_of(version, m.name, rank), masks, f"{self.job}/{rank}"
                )
                tensors |= cut
        constants = self.constants(version, server)
        tensors |= {k: t for k, t in version.dense.items() if k not in constants}
        offered, extra = server.offer(tensors, device, number)
        extra |= server.ask(device, number)
        if half := next((m for m in pairs if (f"{m}.A" in offered) != (f"{m}.B" in offered)), ""):
            raise WireError(f"`offer` leaves out one factor of `{half}`: a device holds both or none")
        dense = {
            k: Dense(tuple(t.shape), k not in constants)
            for k, t in sorted(version.dense.items())
            if k in offered or k in constants
        }
        spec = Spec({m: p for m, p in pairs.items() if f"{m}.A" in offered}, dense)
        frame: Tensors = {k: self._halved(t) for k, t in sorted(offered.items())}
        frame |= {f"x/{n}/{k}": t for n, ts in sorted(extra.items()) for k, t in sorted(ts.items())}
        return self.blobs.put(encode(frame, msgspec.to_builtins(spec))), spec

    def _halved(self, t: Array) -> Array:
        """Floats travel as fp16 in product space, where a view is made anew each round; counters and masks
        stay what they are."""
        if t.dtype.kind != "f":
            return t
        return t.astype(np.float16 if self.half else np.float32)

    def view_of(self, version: Version, module: str, rank: int) -> LowRank:
        """The canonical view of a rank, made once per version and kept."""
        key = (module, rank)
        if key not in version.views:
            version.views[key] = self._make_view(version, module, rank, None)
        return version.views[key]

    def _make_view(self, version: Version, module: str, rank: int, previous: LowRank | None) -> LowRank:
        pair = version.pairs[module]
        if self.plan.stack.space == "factors":
            return LowRank(pair.B[:, :rank].astype(np.float32), pair.A[:rank].astype(np.float32))
        return views.view(views.grow(pair, rank), rank, previous, self.plan.spec.seed, module, self.half)

    def carry_views(self, old: Version, new: Version) -> None:
        """Make every view of the old version for the new one, turned onto what devices of that rank hold."""
        for (module, rank), previous in sorted(old.views.items()):
            new.views[module, rank] = self._make_view(new, module, rank, previous)

    def _below(
        self, version: Version, placement: Mapping[str, int], masks: Masks, *, complete: bool
    ) -> Blob | None:
        """Adapted layers that this device does not train: frozen, refreshed every `frozen_every` rounds."""
        snapshot = version if complete else self._snapshot(version)
        tensors: Tensors = {}
        pairs: dict[str, Pair] = {}
        for m in self.plan.modules:
            pair = snapshot.pairs[m.name]
            if m.name not in placement and np.any(pair.B):
                pairs[m.name], cut = self._cut(m, pair, masks, "frozen", trained=False)
                tensors |= {k: t.astype(np.float16) for k, t in cut.items()}
        return self.blobs.put(encode(tensors, msgspec.to_builtins(Spec(pairs, {})))) if tensors else None

    def _cut(
        self, m: Module, pair: LowRank, masks: Masks, view: str, trained: bool = True
    ) -> tuple[Pair, Tensors]:
        """A canonical pair as a device holds it: its entry in the spec, and its compact arrays by name."""
        out, in_ = masks.get(f"{m.name}.out"), masks.get(f"{m.name}.in")
        kept_out, kept_in = (m.out if out is None else len(out)), (m.in_ if in_ is None else len(in_))
        if kept := [t.astype("<i4").tobytes() for t in (out, in_) if t is not None]:
            # as many channels, but others, are other coordinates
            view = f"{view}/{digest_of(b''.join(kept))[:16]}"
        spec = Pair(
            m.layer,
            m.out,
            m.in_,
            pair.A.shape[0],
            self.plan.spec.adapter.scale,
            kept_out,
            kept_in,
            view,
            trained,
        )
        return spec, {f"{m.name}.{side}": t for side, t in views.cut(pair, out, in_).items()}

    def snapshot_number(self, version: int) -> int:
        """The version whose lower layers devices hold in a round that starts from `version`."""
        return version - version % self.plan.spec.frozen_every

    def _snapshot(self, version: Version) -> Version:
        number = self.snapshot_number(version.number)
        if number == version.number:
            self._frozen = (number, version)
        if self._frozen is None or self._frozen[0] != number:
            self._frozen = (number, self.registry.load(number))
        return self._frozen[1]


def first_value(value: Array) -> Array:
    """Floats of the adapter are fp32; other dtypes are kept."""
    return value.astype(np.float32) if value.dtype.kind == "f" else np.asarray(value)
