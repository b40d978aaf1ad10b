"""Our side of `make bench-device`: the worker's own training loop on a workload."""

import itertools
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from .work import RANK, SCALE, SEED, Work, depth


def train(
    work: Work, key: str, numerics: str, loaded: Any, **options: Any
) -> tuple[list[float], list[float]]:
    """Seconds and loss of every step."""
    from rankfleet.coordinator.planning import importance as channels
    from rankfleet.edge_agent.model import Base
    from rankfleet.edge_agent.model.stored.prepared import Shelf
    from rankfleet.profiles.card import read_card

    folder = Path(work.folder)
    card = read_card(folder)
    masks = channels.masks(card, channels.importance(folder, card), 0.5) if key == "prune_50" else {}
    shelf = Shelf(
        folder.parent / "shelf" if work.causal else Path(tempfile.gettempdir()) / "rankfleet-bench-shelf", 1e6
    )
    bits = {"fp32": 32, "bf16": 16, "int8": 8, "nf4": 4}[numerics.removesuffix("-bf16")]
    base = Base(
        folder, [], bits, masks, work.causal, half=numerics.endswith("-bf16"), shelf=shelf, digest=card.digest
    )
    first = card.layers - depth(card.layers, key)
    spec, tensors = adapter(base, card, work, first)
    stamps: list[float] = []
    losses: list[float] = []

    def progress(step: int, loss: float) -> None:
        stamps.append(time.perf_counter())
        losses.append(loss)

    base.place(spec, tensors)
    trainer = trainer_of(base, work, spec, work.steps, work.examples, progress)
    if key.endswith("cached"):
        _warm(base, trainer, work, first)

    def in_order(skip: int = 0) -> Iterator[dict[str, Any]]:
        for at in range(0, work.steps * work.batch, work.batch):
            yield trainer.collate(work.examples[at : at + work.batch])

    trainer.batches = in_order  # type: ignore[method-assign]
    loaded()
    stamps.append(time.perf_counter())
    trainer.run(tensors, {})
    return [b - a for a, b in itertools.pairwise(stamps)], losses


def adapter(base: Any, card: Any, work: Work, first: int) -> tuple[Any, dict[str, Any]]:
    """Spec and fresh tensors of adapters on q and v from layer `first` on, and of the head."""
    from rankfleet.federated.contract.spec import Dense, Pair, Spec

    ends = ("q_proj", "v_proj") if work.causal else ("query", "value")
    modules = [m for m in card.modules if m.layer >= first and m.name.endswith(ends)]
    rng = np.random.default_rng(SEED)
    size = {m.name: (base.sites[m.name].base.out, base.sites[m.name].base.in_) for m in modules}
    pairs = {m.name: Pair(m.layer, m.out, m.in_, RANK, SCALE, *size[m.name], "") for m in modules}
    tensors = {
        f"{n}.A": rng.uniform(-1, 1, (RANK, i)).astype(np.float32) / i**0.5 for n, (_, i) in size.items()
    }
    tensors |= {f"{n}.B": np.zeros((o, RANK), np.float32) for n, (o, _) in size.items()}
    dense = (
        {}
        if work.causal
        else {"head.weight": Dense([work.labels, card.hidden]), "head.bias": Dense([work.labels])}
    )
    for name, d in dense.items():
        bound = card.hidden**-0.5 if name.endswith("weight") else 0.0
        tensors[name] = rng.uniform(-bound, bound, d.shape).astype(np.float32)
    return Spec(pairs, dense), tensors


def trainer_of(
    base: Any, work: Work, spec: Any, steps: int, examples: Any, progress: Any, round: int = 1
) -> Any:
    """The worker's trainer for a round of so many steps."""
    from rankfleet.edge_agent.tasks import engine
    from rankfleet.edge_agent.worker.trainer import Trainer
    from rankfleet.federated.contract.catalogue import build_stack
    from rankfleet.federated.contract.client_side import ClientSide
    from rankfleet.federated.contract.contexts import Round
    from rankfleet.federated.contract.stack import Stack
    from rankfleet.federated.wire.messages import Recipe, Task

    job: Any = SimpleNamespace(
        job="bench", round=round, rounds=round, recipe=Recipe(32, work.batch, steps, work.lr), seed=SEED
    )
    stack = Stack(build_stack([]), "product")
    client = ClientSide(
        stack, "bench", Round(round, round), "d", spec, steps=steps, lr=work.lr, down={}, state=None
    )
    kind = "causal_lm" if work.causal else "text_classification"
    task = engine(Task("bench", kind, [str(n) for n in range(work.labels)], 512), str(work.folder))
    return Trainer(base, task, job, client, examples, progress)


def _warm(base: Any, trainer: Any, work: Work, at: int) -> None:
    """Fill the cache of the layers below `at`, as a first epoch would."""
    import torch

    from rankfleet.edge_agent.model.cache.activations import example_key

    for e in work.examples:
        e["key"] = example_key(e["ids"])
    base.cache(at, [e["ids"] for e in work.examples], 1e5)
    with torch.no_grad():
        for n in range(0, len(work.examples), 16):
            base.hidden(trainer.collate(work.examples[n : n + 16]))
    base.lighten()
