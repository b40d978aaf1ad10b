"""What the demo's figures are compared with: head only, every device alone, and what pooling the data
would give."""

from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch

from rankfleet.bandit.arms import Arm, expand
from rankfleet.coordinator.aggregate import combine, stacked
from rankfleet.coordinator.jobs.plan import Plan
from rankfleet.coordinator.planning import importance as channels
from rankfleet.coordinator.planning import views
from rankfleet.coordinator.store.versions import Version
from rankfleet.edge_agent.config import Dataset
from rankfleet.edge_agent.model import Base, as_tensor
from rankfleet.edge_agent.tasks import engine
from rankfleet.edge_agent.worker.data import Shard
from rankfleet.edge_agent.worker.trainer import Trainer
from rankfleet.federated.contract.client_side import ClientSide
from rankfleet.federated.contract.contexts import Round
from rankfleet.federated.contract.server_side import ServerSide
from rankfleet.federated.contract.spec import Dense, Pair, Spec
from rankfleet.federated.contract.stack import Stack
from rankfleet.federated.contract.tensors import Tensors
from rankfleet.federated.contract.update import Update
from rankfleet.federated.wire.messages import Assignment, Recipe
from rankfleet.profiles.card import ModelCard

Rows = list[dict[str, Any]]


class Evaluator:
    """Accuracy of a global version on the test set, in fp32 on the unpruned base."""

    def __init__(self, model: Path, plan: Plan, test: Rows) -> None:
        self.plan, self.task = plan, engine(plan.task(), str(model))
        number = {label: i for i, label in enumerate(plan.spec.task.labels)}
        self.examples = self.task.encode([{**r, "label": number[r["label"]]} for r in test])
        self.base = Base(model, [m.name for m in plan.modules], 32, {})

    def scores(self, version: Version) -> torch.Tensor:
        """Logits of every test example, (count, labels)."""
        spec, tensors = whole(self.plan, version)
        self.base.place(spec, tensors)
        head = {k: as_tensor(t) for k, t in version.dense.items()}
        with torch.inference_mode():
            parts = [
                self.task.forward(self.base, head, self.task.collate(self.examples[i : i + 64]))
                for i in range(0, len(self.examples), 64)
            ]
        return torch.cat(parts)

    def accuracy(self, version: Version) -> float:
        """Share of right answers."""
        right = self.scores(version).argmax(-1) == torch.tensor([e["label"] for e in self.examples])
        return float(right.float().mean())


def whole(plan: Plan, version: Version) -> tuple[Spec, Tensors]:
    """A version as spec and tensors for an unpruned base."""
    pairs, tensors = {}, {}
    for m in plan.modules:
        pair = version.pairs[m.name]
        pairs[m.name] = Pair(
            m.layer, m.out, m.in_, pair.A.shape[0], plan.spec.adapter.scale, m.out, m.in_, "", trained=False
        )
        tensors |= {f"{m.name}.A": pair.A, f"{m.name}.B": pair.B}
    return Spec(pairs, {k: Dense(t.shape) for k, t in version.dense.items()}), tensors


def local_accuracy(
    model: str,
    plan_bytes: tuple[Any, ModelCard],
    shard: str,
    arms: list[dict[str, Any]],
    test: Rows,
    seed: int,
) -> float:
    """A device alone: its own arms, steps and data, the same engine and aggregation with itself as only
    member."""
    torch.set_num_threads(1)
    plan = Plan(*plan_bytes)
    task = engine(plan.task(), model)
    data = Shard(Dataset(shard), "docs", task.fields, list(plan.spec.task.labels))
    examples = task.encode(data.train)
    rank = max(_rank(a, plan) for a in arms)
    version = Version(
        0,
        {
            m.name: stacked.balanced(np.zeros((m.out, 1)), np.zeros(1), np.zeros((1, m.in_)), rank)
            for m in plan.modules
        },
        _head(plan),
        {},
        {},
    )
    scores = channels.importance(Path(model), plan.card) if any(a["prune"] for a in arms) else {}
    base: tuple[tuple[int, float], Base] | None = None
    for number, told in enumerate(arms):
        arm = msgspec.convert(told, Arm)
        if base is None or base[0] != (arm.bits, arm.prune):
            masks = channels.masks(plan.card, scores, arm.prune)
            base = (
                (arm.bits, arm.prune),
                Base(Path(model), [m.name for m in plan.card.modules], arm.bits, masks),
            )
        version = _alone(plan, version, arm, number, base[1], task, examples, masks, seed)
    return Evaluator(Path(model), plan, test).accuracy(version)


def _rank(arm: dict[str, Any], plan: Plan) -> int:
    return max(expand(arm["placement"], plan.card, plan.modules).values())


def _head(plan: Plan) -> Tensors:
    from rankfleet.federated.contract.stack import seed_of

    rng = np.random.default_rng(seed_of(plan.spec.seed, "head"))
    return {
        k: (rng.standard_normal(s) * (0.02 if len(s) > 1 else 0.0)).astype(np.float32)
        for k, s in sorted(plan.heads.items())
    }


def _alone(
    plan: Plan,
    version: Version,
    arm: Arm,
    number: int,
    base: Base,
    task: Any,
    examples: Rows,
    masks: Any,
    seed: int,
) -> Version:
    placement = expand(arm.placement, plan.card, plan.modules)
    pairs, tensors = {}, dict(version.dense)
    for m in plan.modules:
        trained = m.name in placement
        view = views.view(
            version.pairs[m.name],
            placement.get(m.name, version.pairs[m.name].A.shape[0]),
            None,
            seed,
            m.name,
            False,
        )
        out, in_ = masks.get(f"{m.name}.out"), masks.get(f"{m.name}.in")
        tensors |= {f"{m.name}.{s}": t.astype(np.float32) for s, t in views.cut(view, out, in_).items()}
        pairs[m.name] = Pair(
            m.layer,
            m.out,
            m.in_,
            view.A.shape[0],
            plan.spec.adapter.scale,
            m.out if out is None else len(out),
            m.in_ if in_ is None else len(in_),
            "",
            trained,
        )
    spec = Spec(pairs, {k: Dense(t.shape) for k, t in version.dense.items()})
    base.place(spec, tensors)
    client = ClientSide(
        Stack({}),
        "local",
        Round(number, plan.spec.rounds),
        "alone",
        spec,
        steps=arm.steps,
        lr=plan.spec.training.lr,
        down={},
    )
    job = Assignment(
        "local",
        number,
        plan.spec.rounds,
        number,
        "train",
        "",
        "",
        plan.task(),
        [],
        "product",
        Recipe(arm.bits, arm.batch, arm.steps, plan.spec.training.lr),
        {},
        seed,
    )
    start = {k: tensors[k] for k in spec.shapes()}
    trainer = Trainer(base, task, job, client, examples)
    trainer.prepare({**tensors, **start}, client.begin(start), {})
    trained = trainer.train()
    update = Update(
        "alone",
        1.0,
        {k: trained[k] - tensors[k] for k in trained},
        spec,
        {k: tensors[k] for k in tensors},
        masks,
    )
    return combine.next_version(
        ServerSide(Stack({}), "local", plan.spec.rounds), version, [update], 1, number
    )[0]


def features(evaluator: Evaluator, rows: Rows) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Frozen mean-pooled features (count, hidden) and labels of rows."""
    evaluator.base.place(Spec({}, {}), {})
    number = {label: i for i, label in enumerate(evaluator.plan.spec.task.labels)}
    examples = evaluator.task.encode([{**r, "label": number[r["label"]]} for r in rows])
    order = sorted(range(len(examples)), key=lambda i: len(examples[i]["ids"]))
    found = np.zeros((len(examples), evaluator.plan.card.hidden), np.float32)
    with torch.inference_mode():
        for at in range(0, len(order), 64):
            picked = order[at : at + 64]
            batch = evaluator.task.collate([examples[i] for i in picked])
            found[picked] = evaluator.task.features(evaluator.base, batch).numpy()  # type: ignore[attr-defined]
    return found, np.array([e["label"] for e in examples])


def head_only(
    plan: Plan,
    shards: dict[str, tuple[Any, Any]],
    test: tuple[Any, Any],
    arms: dict[str, list[dict[str, Any]]],
) -> float:
    """A federated head on frozen features: the job's rounds, steps, batch and rate, averaged by examples."""
    head = {k: torch.from_numpy(t) for k, t in _head(plan).items()}
    total = sum(len(y) for _, y in shards.values())
    for number in range(plan.spec.rounds):
        mean = {k: torch.zeros_like(t) for k, t in head.items()}
        for device, (x, y) in sorted(shards.items()):
            arm = arms[device][min(number, len(arms[device]) - 1)]
            local = {k: t.clone().requires_grad_() for k, t in head.items()}
            optimiser = torch.optim.AdamW(local.values(), lr=plan.spec.training.lr, weight_decay=0.0)
            generator = torch.Generator().manual_seed(number)
            for _ in range(arm["steps"]):
                picked = torch.randint(len(y), (arm["batch"],), generator=generator)
                scores = torch.from_numpy(x)[picked] @ local["head.weight"].T + local["head.bias"]
                optimiser.zero_grad()
                torch.nn.functional.cross_entropy(scores, torch.from_numpy(y)[picked]).backward()
                optimiser.step()
            for k in mean:
                mean[k] += local[k].detach() * (len(y) / total)
        head = mean
    scores = torch.from_numpy(test[0]) @ head["head.weight"].T + head["head.bias"]
    return float((scores.argmax(-1) == torch.from_numpy(test[1])).float().mean())


def pooled(
    train: Rows, test: Rows, probe: tuple[Any, Any], probe_test: tuple[Any, Any]
) -> tuple[float, float]:
    """(TF-IDF with logistic regression, logistic regression on frozen features), both on the pooled
    training set."""
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression

    words = TfidfVectorizer(sublinear_tf=True, min_df=2)
    x, z = words.fit_transform([r["text"] for r in train]), words.transform([r["text"] for r in test])
    tfidf = (
        LogisticRegression(max_iter=300, C=10)
        .fit(x, [r["label"] for r in train])
        .score(z, [r["label"] for r in test])
    )
    linear = LogisticRegression(max_iter=300, C=1).fit(*probe).score(*probe_test)
    return float(tfidf), float(linear)
