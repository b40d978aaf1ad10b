"""A whole trainer on the tiny model for a few methods, without a coordinator."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import numpy as np

from rankfleet.edge_agent.model import Base
from rankfleet.edge_agent.tasks import engine
from rankfleet.edge_agent.worker.trainer import Trainer
from rankfleet.federated.contract.client_side import ClientSide
from rankfleet.federated.contract.contexts import Round
from rankfleet.federated.contract.method import Method
from rankfleet.federated.contract.spec import Dense, Pair, Spec
from rankfleet.federated.contract.stack import Stack
from rankfleet.federated.contract.tensors import Tensors
from rankfleet.federated.wire.messages import Recipe, Task
from rankfleet.profiles.card import read_card

TEXTS = ("red sun", "blue", "cat dog bird", "tree", "rock sea", "moon", "green star", "dog")


def adapter(folder: Path, rank: int = 2, dense: Tensors | None = None) -> tuple[Spec, Tensors]:
    """A seeded adapter on every map of a model, with a head for two labels; B is not zero."""
    card, rng = read_card(folder), np.random.default_rng(0)
    tensors = {f"{m.name}.A": rng.standard_normal((rank, m.in_)).astype(np.float32) for m in card.modules}
    tensors |= {
        f"{m.name}.B": 0.1 * rng.standard_normal((m.out, rank)).astype(np.float32) for m in card.modules
    }
    heads = {
        "head.weight": rng.standard_normal((2, 16)).astype(np.float32),
        "head.bias": np.zeros(2, np.float32),
        **(dense or {}),
    }
    pairs = {m.name: Pair(m.layer, m.out, m.in_, rank, 2.0, m.out, m.in_, "") for m in card.modules}
    return Spec(pairs, {k: Dense(t.shape) for k, t in heads.items()}), tensors | heads


def rig(
    folder: Path, methods: dict[str, Method], *, spec: Spec, tensors: Tensors,
    down: dict[str, Tensors] | None = None,
    state: dict[str, Any] | None = None, base: Base | None = None, round: int = 1, **recipe: Any,
) -> Trainer:  # fmt: skip
    """A trainer that is prepared for `tensors`; keyword arguments change the recipe (batch 4, 4 steps, lr
    0.05)."""
    stack = Stack(methods, "factors")
    plain = {"optimizer": "sgd", "clip": 0.0, "warmup": 0.0} if stack.plain else {}
    settings = msgspec.structs.replace(Recipe(32, 4, 4, 0.05), **{**plain, **recipe})
    job: Any = SimpleNamespace(job="j", round=round, rounds=3, recipe=settings, seed=1)
    client = ClientSide(
        stack, "j", Round(round, 3), "d", spec, steps=settings.steps, lr=settings.lr, down=down or {},
        state=state
    )  # fmt: skip
    task = engine(Task("d", "text_classification", ["a", "b"], 8), str(folder))
    rows = task.encode([{"text": t, "label": n % 2} for n, t in enumerate(TEXTS)])
    base = base or Base(folder, [], 32, {})
    base.place(spec, tensors)
    trainer = Trainer(base, task, job, client, rows)
    start = client.begin({**{k: tensors[k] for k in spec.shapes()}, **client.own()})
    trainer.prepare(tensors, start, down or {})
    return trainer
