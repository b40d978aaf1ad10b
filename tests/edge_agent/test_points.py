"""Hooks look at the model at any point: what they are given is a function of the point, and the loop moves
what it is told to."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch

from rankfleet.edge_agent.worker.batches import split
from rankfleet.federated.contract.contexts import StepContext, Torch
from rankfleet.federated.contract.method import Method
from rankfleet.federated.contract.places import Places
from rankfleet.federated.contract.spec import Pair, Spec
from rankfleet.federated.contract.tensors import Tensors
from rankfleet.federated.errors import Conflict, HookError, Refused

from .rig import adapter, rig

LOOK: dict[str, Any] = {}


class Look(Method, frozen=True):
    """Leaves its context in `LOOK`."""

    def train(self, start: dict[str, Torch], ctx: StepContext) -> dict[str, Torch]:
        LOOK["ctx"], LOOK["start"] = ctx, start
        return start


def looking(
    tiny: Path, down: dict[str, Tensors] | None = None, **recipe: Any
) -> tuple[StepContext, dict[str, Torch]]:
    spec, tensors = adapter(tiny)
    trainer = rig(tiny, {"look": Look()}, spec=spec, tensors=tensors, down=down, **recipe)
    trainer.train()
    return LOOK["ctx"], LOOK["start"]


def test_factors_of_a_point_count_like_heads(tiny: Path) -> None:
    ctx, start = looking(tiny)
    batch = next(ctx.batches())
    here = float(ctx.task_loss(start, batch))
    assert here == float(ctx.task_loss({}, batch))
    for part in (".A", ".B", "head.weight"):
        moved = {k: 3 * t for k, t in start.items() if part in k}
        assert float(ctx.task_loss(moved, batch)) != here, part
    assert float(ctx.task_loss(start, batch)) == here


def test_the_gradient_is_that_of_the_point(tiny: Path) -> None:
    ctx, start = looking(tiny)
    batch = next(ctx.batches())
    point = {k: t + 0.1 for k, t in start.items()}
    value, grads = ctx.gradient(point, batch)
    leaves = {k: t.clone().requires_grad_() for k, t in point.items()}
    loss = ctx.task_loss(leaves, batch)
    wanted = torch.autograd.grad(loss, list(leaves.values()))
    assert value == float(loss.detach())
    assert all(torch.equal(g, w) for g, w in zip(grads.values(), wanted, strict=True))
    scaled = torch.ones(1, requires_grad=True)
    (through,) = torch.autograd.grad(ctx.task_loss({k: scaled * t for k, t in point.items()}, batch), scaled)
    assert float(through) == pytest.approx(
        sum(float((g * point[k]).sum()) for k, g in grads.items()), rel=1e-4
    )


def test_two_points_in_one_graph_with_checkpointing(tiny: Path) -> None:
    """On the way back a layer is computed again, by then the model stands at the other point."""
    ctx, start = looking(tiny)
    batch, core = next(ctx.batches()), LOOK["ctx"].task_loss.__self__.base.core
    found = []
    for core.checkpointing in (False, True):
        leaves = {k: t.clone().requires_grad_() for k, t in start.items()}
        both = ctx.task_loss(leaves, batch) + ctx.task_loss({k: 2 * t for k, t in leaves.items()}, batch)
        found.append(torch.autograd.grad(both, list(leaves.values())))
    assert all(torch.allclose(a, b, atol=1e-7) for a, b in zip(*found, strict=True))


def test_views_of_the_model_agree_with_each_other(tiny: Path) -> None:
    ctx, start = looking(tiny)
    batch = next(ctx.batches())
    features = ctx.features(start, batch)
    scores = features @ start["head.weight"].t() + start["head.bias"]
    assert torch.allclose(ctx.scores(start, batch), scores, atol=1e-6)
    assert torch.equal(ctx.losses(start, batch).mean(), ctx.task_loss(start, batch))
    last, mask = ctx.hidden(start, batch), batch["attention_mask"].unsqueeze(-1)
    assert torch.allclose((last * mask).sum(1) / mask.sum(1), features, atol=1e-5)
    first = ctx.hidden(start, batch, 0)
    assert first.shape == last.shape
    assert torch.equal(
        first, ctx.hidden({k: 2 * t for k, t in start.items()}, batch, 0)
    )  # embeddings know no adapter
    assert not torch.allclose(ctx.hidden(start, batch, 1), last)
    with pytest.raises(Refused, match="2 layers"):
        ctx.hidden(start, batch, 3)
    with pytest.raises(Refused, match="causal"):
        ctx.choices(start, batch, [1])


def test_pieces_of_a_batch_and_public_texts(tiny: Path) -> None:
    ctx, start = looking(tiny)
    batch = next(ctx.batches())
    pieces = [ctx.gradient(start, p)[1] for p in ctx.split(batch)]
    assert len(pieces) == len(batch["labels"])
    _, whole = ctx.gradient(start, batch)
    for k, g in whole.items():
        assert torch.allclose(sum(p[k] for p in pieces) / len(pieces), g, rtol=1e-4, atol=1e-5), k
    assert [len(p["labels"]) for p in split(batch, 3)] == [3, 1]
    public = ctx.collate(ctx.encode([{"text": "red sun", "label": 0}, {"text": "moon", "label": 0}]))
    assert ctx.scores(start, public).shape == (2, 2)
    assert len(ctx.examples) == 8


def test_what_was_sent_along_keeps_its_dtypes(tiny: Path) -> None:
    """As fp32, 2⁴⁰ + 1 would be 2⁴⁰."""
    sent = {"n": np.array([2**40 + 1]), "mask": np.array([True, False]), "h": np.ones(2, np.float16)}
    ctx, _ = looking(tiny, down={"look": sent})
    assert int(ctx.down["n"][0]) == 2**40 + 1
    assert (ctx.down["mask"].dtype, ctx.down["h"].dtype) == (torch.bool, torch.float16)


def test_what_does_not_move_stands_still(tiny: Path) -> None:
    """Once with moments in the other half of the steps before: zero gradients alone would let AdamW move
    on."""
    ctx, start = looking(tiny, steps=6)
    first = ctx.fit(start, only=lambda name: name.startswith("head."), steps=3)
    second = ctx.fit(first, only=lambda name: not name.startswith("head."), steps=3)
    for name, t in start.items():
        assert torch.equal(first[name], t) != name.startswith("head."), name
        assert torch.equal(second[name], first[name]) == name.startswith("head."), name


def test_a_mask_moves_single_entries(tiny: Path) -> None:
    ctx, start = looking(tiny)
    mask = torch.zeros(2, 16, dtype=torch.bool)
    mask[0, :3] = True
    moved = ctx.fit(start, only=lambda name: mask if name == "head.weight" else False)
    assert torch.equal(moved["head.weight"] != start["head.weight"], mask)
    assert all(torch.equal(moved[k], t) for k, t in start.items() if k != "head.weight")
    numpy = ctx.fit(start, only=lambda name: mask.numpy() if name == "head.weight" else False)
    assert torch.equal(numpy["head.weight"], moved["head.weight"])
    with pytest.raises(HookError, match=r"method `look`, hook `train`: says .* in `only`"):
        ctx.fit(start, only=lambda name: np.ones(3))


def test_fit_looks_at_the_part_that_stands_still_where_fit_began(tiny: Path) -> None:
    ctx, start = looking(tiny, steps=1)
    elsewhere = {k: t + (0.5 if k.startswith("head.") else 0.0) for k, t in start.items()}
    a, b = (ctx.fit(s, only=lambda name: name.endswith(".B"), steps=1) for s in (start, elsewhere))
    assert any(not torch.equal(a[k], b[k]) for k in a if k.endswith(".B"))


class Plain(Look, frozen=True):
    """The gradient is the step."""

    plain: ClassVar[bool] = True


def test_a_plain_step_is_the_gradient(tiny: Path) -> None:
    spec, tensors = adapter(tiny)
    rig(tiny, {"look": Plain()}, spec=spec, tensors=tensors, lr=0.5).train()
    ctx, start = LOOK["ctx"], LOOK["start"]
    _, grads = ctx.gradient(start, next(ctx.batches()))
    assert torch.stack([g.norm() for g in grads.values()]).norm() > 1  # would be clipped
    moved = ctx.fit(start, steps=1)
    assert all(torch.allclose(moved[k], start[k] - 0.5 * grads[k], atol=1e-6) for k in start)
    with pytest.raises(Refused, match="adamw"):
        rig(tiny, {"look": Plain()}, spec=spec, tensors=tensors, optimizer="adamw")


class Uphill(Method, frozen=True):
    """The gradient at w + 0.01·g, as SAM does."""

    def gradient(
        self, params: Mapping[str, Torch], batch: dict[str, Torch], ctx: StepContext
    ) -> tuple[float, dict[str, Torch]]:  # fmt: skip
        _, first = ctx.gradient(params, batch)
        return ctx.gradient({k: p + 0.01 * first[k] for k, p in params.items()}, batch)


def test_gradient_from_another_point(tiny: Path) -> None:
    spec, tensors = adapter(tiny)
    ctx, start = looking(tiny, steps=1, optimizer="sgd", clip=0.0)
    batch = next(ctx.batches())
    _, first = ctx.gradient(start, batch)
    _, second = ctx.gradient({k: t + 0.01 * first[k] for k, t in start.items()}, batch)
    trained = rig(
        tiny, {"uphill": Uphill()}, spec=spec, tensors=tensors, steps=1, optimizer="sgd", clip=0.0
    ).train()
    for k, t in start.items():
        assert np.allclose(trained[k], (t - 0.05 * second[k]).numpy(), atol=1e-6), k


class Half(Method, frozen=True):
    """Every pair is half of a rank-3 pair `<module>.left`·`.right` that is trained in its place."""

    def express(self, params: Mapping[str, Any], spec: Spec, xp: Any) -> dict[str, Any]:
        out = {f"{m}.B": params[f"{m}.left"] * 0.5 for m in spec.pairs}
        return out | {
            f"{m}.A": xp.concatenate([params[f"{m}.right"], params[f"{m}.right"][:1]]) for m in spec.pairs
        }


def expressed(tiny: Path) -> tuple[Spec, Tensors]:
    spec, _ = adapter(tiny)
    rng = np.random.default_rng(3)
    added = {f"{m}.left": rng.standard_normal((p.out, 3)).astype(np.float32) for m, p in spec.pairs.items()}
    added |= {f"{m}.right": rng.standard_normal((2, p.in_)).astype(np.float32) for m, p in spec.pairs.items()}
    wide, more = adapter(tiny, dense=added)
    pairs = {m: Pair(p.layer, p.out, p.in_, 0, p.scale, p.out, p.in_, "") for m, p in wide.pairs.items()}
    more |= {k: t[:, :0] if k.endswith(".B") else t[:0] for k, t in more.items() if k.endswith((".A", ".B"))}
    return Spec(pairs, wide.dense), more


def test_expressed_factors_are_trained_through_and_are_the_same_in_numpy(tiny: Path) -> None:
    spec, tensors = expressed(tiny)
    trainer = rig(tiny, {"half": Half()}, spec=spec, tensors=tensors)
    batch = next(trainer.batches())
    at = trainer.points.scores({}, batch)
    shown = trainer.client.stack.express(tensors, spec, np)
    plain, _ = adapter(tiny, rank=3)
    other = rig(tiny, {}, spec=plain, tensors={k: shown[k] for k in (*plain.shapes(),)})
    assert torch.allclose(other.points.scores({}, batch), at, atol=1e-6)
    trained = trainer.train()
    assert not any(k.endswith((".A", ".B")) for k in trained)
    assert all(np.any(trained[k] != tensors[k]) for k in trained if k.endswith((".left", ".right")))


class Wrong(Method, frozen=True):
    """Pairs that do not fit."""

    def express(self, params: Mapping[str, Any], spec: Spec, xp: Any) -> dict[str, Any]:
        return {f"{m}.B": xp.zeros((3, p.rank)) for m, p in spec.pairs.items()}


def test_pairs_that_do_not_fit_are_named(tiny: Path) -> None:
    spec, tensors = adapter(tiny)
    with pytest.raises(
        HookError, match=r"method `wrong`, hook `express`: gives `encoder.layer.0.* the map is"
    ):
        rig(tiny, {"wrong": Wrong()}, spec=spec, tensors=tensors)


SEEN: list[str] = []


class Around(Method, frozen=True):
    """At every place, what changes nothing or a known amount."""

    shift: float = 0.0

    def attach(self, model: Places, spec: Spec, ctx: StepContext | None) -> None:
        name = next(iter(spec.pairs))
        model.before(name, lambda x, p, layout: x + self.shift)
        model.after(name, lambda y, x, p, layout: self.noted("after", y))
        model.enter(1, lambda x, p, layout: self.noted("enter", x))
        model.pooled(lambda z, p: self.left(model, z, p))

    def noted(self, place: str, x: Torch) -> Torch:
        SEEN.append(place)
        return x

    def left(self, model: Places, z: Torch, p: Mapping[str, Torch]) -> Torch:
        model.seen["bias"] = p["head.bias"]
        return z * (1 + self.shift)


def test_functions_run_at_their_places_and_go_with_the_round(tiny: Path) -> None:
    spec, tensors = adapter(tiny)
    bare = rig(tiny, {}, spec=spec, tensors=tensors)
    batch = next(bare.batches())
    plain = bare.points.scores({}, batch)
    SEEN.clear()
    trainer = rig(tiny, {"around": Around()}, spec=spec, tensors=tensors, base=bare.base)
    assert torch.equal(trainer.points.scores({}, batch), plain)
    assert SEEN == ["after", "enter"]
    assert trainer.contexts["around"].seen["bias"] is trainer.points.rest["head.bias"]
    moved = rig(
        tiny, {"around": Around(shift=0.5)}, spec=spec, tensors=tensors, base=bare.base
    ).points.scores({}, batch)
    assert not torch.allclose(moved, plain)
    bare.base.clear()
    again = rig(tiny, {}, spec=spec, tensors=tensors, base=bare.base)
    assert torch.equal(again.points.scores({}, batch), plain)


class Front(Method, frozen=True):
    """Two rows in front."""

    def attach(self, model: Places, spec: Spec, ctx: StepContext | None) -> None:
        model.front(2, lambda p: p["front"])


def test_rows_in_front_are_read_and_taken_off_again(tiny: Path) -> None:
    spec, tensors = adapter(
        tiny, dense={"front": np.random.default_rng(5).standard_normal((2, 16)).astype(np.float32)}
    )
    trainer = rig(tiny, {"front": Front()}, spec=spec, tensors=tensors)
    batch = next(trainer.batches())
    hidden = trainer.points.hidden({}, batch)
    assert hidden.shape == (*batch["input_ids"].shape, 16)
    _, grads = trainer.steps.gradient({"front": trainer.start["front"]}, batch)
    assert float(grads["front"].abs().min()) > 0
    # One by one, without padding, texts give what they give together.
    for n, piece in enumerate(split(batch)):
        alone = trainer.points.hidden({}, piece)[0]
        assert torch.allclose(alone, hidden[n, : len(alone)], atol=1e-5)
    with pytest.raises(Conflict, match="in front"):
        rig(tiny, {"a": Front(), "b": Front()}, spec=spec, tensors=tensors)


class Unkind(Method, frozen=True):
    """Returns what it must not."""

    hook: str = ""

    def grad(self, grad: dict[str, Torch], params: Mapping[str, Torch], ctx: StepContext) -> dict[str, Torch]:
        if self.hook == "state":
            ctx.state["sum"] = grad["head.bias"]
        return {k: g for k, g in grad.items() if k != "head.bias"} if self.hook == "grad" else grad

    def loss(
        self, loss: Torch, params: Mapping[str, Torch], batch: dict[str, Torch], ctx: StepContext
    ) -> Torch:
        return loss.expand(2) if self.hook == "loss" else loss

    def arrived(self, params: Mapping[str, Torch], ctx: StepContext) -> Tensors:
        return {"norms": params["head.bias"]} if self.hook == "arrived" else {}


@pytest.mark.parametrize(
    ("hook", "words"),
    [
        ("grad", "hook `grad`: leaves out `head.bias`"),
        ("loss", r"hook `loss`: gives a Tensor of shape \(2,\), which is no scalar loss"),
        ("state", "hook `loss` or `grad`: leaves a torch Tensor in `ctx.state` as `sum`"),
        ("arrived", "hook `arrived`: gives `norms` as a torch Tensor, not as a NumPy array"),
    ],
)
def test_what_a_hook_must_not_do_is_said_by_method_and_hook(tiny: Path, hook: str, words: str) -> None:
    spec, tensors = adapter(tiny)
    trainer = rig(tiny, {"unkind": Unkind(hook=hook)}, spec=spec, tensors=tensors)

    def whole_round() -> None:
        trainer.look("arrived")
        trainer.train()

    with pytest.raises(HookError, match=f"method `unkind`, {words}"):
        whole_round()


class Looks(Method, frozen=True):
    """Looks before and after, and trains on two examples."""

    def arrived(self, params: Mapping[str, Torch], ctx: StepContext) -> Tensors:
        return {"before": np.array([float(ctx.task_loss(params, ctx.collate(ctx.examples)))])}

    def data(self, examples: list[dict[str, Any]], ctx: StepContext) -> list[dict[str, Any]]:
        return examples[:2]

    def trained(self, params: Mapping[str, Torch], ctx: StepContext) -> Tensors:
        return {
            "after": np.array([float(ctx.task_loss(params, ctx.collate(ctx.examples))), len(ctx.examples)])
        }

    def answer(self, question: Tensors, ctx: StepContext) -> Tensors:
        return {"twice": 2 * question["x"]}


def test_looks_travel_beside_the_update(tiny: Path) -> None:
    spec, tensors = adapter(tiny)
    trainer = rig(tiny, {"looks": Looks()}, spec=spec, tensors=tensors)
    everything = trainer.collate(trainer.examples)
    trainer.look("arrived")
    trained = trainer.train()
    trainer.look("trained")
    up = trainer.client.up["looks"]
    assert up["before"][0] == pytest.approx(float(trainer.points.task_loss(as_point(tensors), everything)))
    assert up["after"].tolist() == [
        pytest.approx(float(trainer.points.task_loss(as_point(trained), trainer.collate(trainer.examples)))),
        2,
    ]
    trainer.answer({"looks": {"x": np.arange(3)}})
    assert trainer.client.up["looks"]["twice"].tolist() == [0, 2, 4]
    assert len(trainer.client.up["looks"]) == 1


def as_point(tensors: Tensors) -> dict[str, Torch]:
    return {k: torch.from_numpy(t) for k, t in tensors.items()}
