"""Collects the demo's figures: what was reached, what it cost, and what the alternatives reach on the same
data."""

import json
import multiprocessing
import subprocess
import sys
import time
from concurrent.futures import Future, ProcessPoolExecutor
from typing import Any

import msgspec
import numpy as np
import torch

from rankfleet.bandit.arms import Arm, expand, rank_and_depth
from rankfleet.coordinator.config import CoordinatorConfig
from rankfleet.coordinator.export import load, write
from rankfleet.coordinator.jobs.plan import Plan
from rankfleet.coordinator.store.versions import Registry
from rankfleet.profiles.card import read_card
from rankfleet.profiles.memory import adapter_parameters

from . import baselines
from .fleet import Fleet
from .watch import Watch

IDLE_AFTER_S = 60.0


class Figures:
    """Everything that goes into `report.json`."""

    def __init__(
        self, fleet: Fleet, watch: Watch, train: list[dict[str, Any]], test: list[dict[str, Any]], digest: str
    ) -> None:
        self.fleet, self.watch, self.train, self.test, self.digest = fleet, watch, train, test, digest
        self.config = CoordinatorConfig(data_dir=str(fleet.home / "coordinator"))
        self.version, self.spec = load(self.config, watch.job, None)
        self.plan = Plan(self.spec, read_card(fleet.model))
        self.arms = watch.arms()

    def collect(self, start: float) -> dict[str, Any]:
        """The whole report."""
        names = [d.name for d in self.fleet.spec.devices]
        torch.set_num_threads(1)
        with ProcessPoolExecutor(2, multiprocessing.get_context("spawn")) as pool:
            alone = {
                d: pool.submit(
                    baselines.local_accuracy,
                    str(self.fleet.model),
                    (self.spec, self.plan.card),
                    str(self.fleet.home / d / "shard.jsonl"),
                    self.arms[d],
                    self.test,
                    self.spec.seed,
                )
                for d in names
            }
            report = self._accuracies()
            report["accuracy_local"] = self._wait(alone)
        report["accuracy_local_mean"] = float(np.mean(list(report["accuracy_local"].values())))
        report |= self._bytes(names)
        report["devices"] = {d: self._device(d) for d in names}
        report |= {
            "rounds": self.spec.rounds,
            "corpus_sha256": self.digest,
            "test_paragraphs": len(self.test),
            "chunks_resumed": self.watch.resumed(),
            "killed": self.watch.killed,
            "agent_idle_rss_mb": self._idle(names),
            "round_accuracy_held_out": self._curve(),
            "version": self.version.number,
        }
        report["wall_s"] = round(time.time() - start, 1)
        return report

    def _accuracies(self) -> dict[str, Any]:
        evaluator = baselines.Evaluator(self.fleet.model, self.plan, self.test)
        registry = Registry(self.config.home / "jobs" / self.watch.job)
        ours = evaluator.scores(self.version).argmax(-1)
        truth = torch.tensor([e["label"] for e in evaluator.examples])
        shards = {
            d: [json.loads(line) for line in (self.fleet.home / d / "shard.jsonl").open(encoding="utf-8")]
            for d in self.arms
        }
        found = {d: baselines.features(evaluator, r) for d, r in shards.items()}
        test = baselines.features(evaluator, self.test)
        everything = tuple(np.concatenate([f[i] for f in found.values()]) for i in (0, 1))
        tfidf, probe = baselines.pooled(self.train, self.test, (everything[0], everything[1]), test)
        print(f"  TF-IDF {tfidf:.3f}, linear probe {probe:.3f} on the pooled data")
        return {
            "accuracy_before": evaluator.accuracy(registry.load(0)),
            "accuracy_after": float((ours == truth).float().mean()),
            "accuracy_head_only": baselines.head_only(self.plan, found, test, self.arms),
            "tfidf_lr": tfidf,
            "linear_probe": probe,
            "accuracy_peft_agreement": self._peft(ours.tolist()),
        }

    def _peft(self, ours: list[int]) -> float:
        """Share of the test set on which plain peft predicts the same label."""
        folder = self.fleet.home / "adapter"
        write(self.config, self.watch.job, folder, self.version.number)
        code = (
            "import sys, json; sys.path.insert(0, sys.argv[1]); from load import load\n"
            "texts = json.load(open(sys.argv[3])); predict = load(sys.argv[2])\n"
            "print(json.dumps([l for i in range(0, len(texts), 64) for l in predict([t['text'] for t in "
            "texts[i:i + 64]])]))"
        )
        done = subprocess.run(
            [
                sys.executable,
                "-c",
                code,
                str(folder),
                str(self.fleet.model),
                str(self.fleet.home / "test.json"),
            ],
            check=False,
            capture_output=True,
        )
        if done.returncode:
            raise RuntimeError(f"plain peft does not load the adapter: {done.stderr.decode()[-800:]}")
        theirs = json.loads(done.stdout.splitlines()[-1])
        return float(np.mean([self.spec.task.labels[o] == t for o, t in zip(ours, theirs, strict=True)]))

    @staticmethod
    def _wait(alone: dict[str, "Future[float]"]) -> dict[str, float]:
        found = {}
        for device, future in alone.items():
            found[device] = future.result()
            print(f"  {device} alone: {found[device]:.3f}", flush=True)
        return found

    def _bytes(self, names: list[str]) -> dict[str, Any]:
        """Sent bytes, and what dense fp16 uploads of the same number of updates would be."""
        card, plan = self.plan.card, self.plan
        counted = {d["device"]: d["bytes_in"] for d in self.watch.client.get("/devices")}
        self.up = {d: max(int(self.fleet.status(d).get("bytes_up", 0)), counted[d]) for d in names}
        arms = [msgspec.convert(a, Arm) for d in names for a in self.arms[d]]
        placed = [expand(a.placement, card, plan.modules) for a in arms]
        top = max(max(p.values()) for p in placed)
        every = sum(min(top, m.out, m.in_) * (m.out + m.in_) for m in plan.modules) + plan.head_size
        same = sum(
            adapter_parameters(card, p, a.prune) + plan.head_size for p, a in zip(placed, arms, strict=True)
        )
        return {
            "bytes_up_total": sum(self.up.values()),
            "bytes_up_dense_lora": 2 * every * len(arms),
            "bytes_up_dense_same_arms": 2 * same,
            "uploads": len(arms),
            "largest_rank": top,
        }

    def _device(self, name: str) -> dict[str, Any]:
        arms = [msgspec.convert(a, Arm) for a in self.arms[name]]
        status = self.fleet.status(name)
        shapes = [
            rank_and_depth(expand(a.placement, self.plan.card, self.plan.modules), self.plan.card)
            for a in arms
        ]
        entry = next(d for d in self.fleet.spec.devices if d.name == name)
        last = [d["why"] for r in self.watch.rounds for d in r["devices"] if d["device"] == name and d["why"]]
        return {
            "profile": entry.profile,
            "model_budget_mb": entry.model_budget_mb,
            "arms": [a.text() for a in arms],
            "bits": arms[-1].bits,
            "depth": [d for _, d in shapes],
            "rank": [r for r, _ in shapes],
            "prune": [a.prune for a in arms],
            "steps": [a.steps for a in arms],
            "bytes_up": self.up[name],
            "bytes_down": int(status.get("bytes_down", 0)),
            "why": last[-1] if last else "",
        }

    def _idle(self, names: list[str]) -> float:
        """The largest VmRSS of an agent with its children, 60 s after its job was done."""
        done = max(float(self.fleet.status(n).get("job_done_at", 0.0)) for n in names)
        wait = done + IDLE_AFTER_S - time.time()
        if wait > 0:
            print(f"  waiting {wait:.0f} s to measure idle agents")
            time.sleep(wait)
        return round(max(self.fleet.idle_rss_mb(n) for n in names), 1)

    def _curve(self) -> list[float | None]:
        """What the devices measured of each version on their own held-out tenths."""
        rows = self.watch.client.get(f"/jobs/{self.watch.job}/versions")
        return [r["metrics"].get("accuracy") for r in rows]
