"""A worker that does everything but train: it adds a slice of a seeded noise table to the adapter that it
is given."""

import os
import time
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np

from rankfleet.edge_agent.order import Order
from rankfleet.edge_agent.worker import __main__
from rankfleet.edge_agent.worker import worker as rounds
from rankfleet.federated.contract.stack import seed_of
from rankfleet.federated.contract.tensors import Tensors

_TABLE = np.random.default_rng(0).standard_normal(1 << 19, np.float32) * np.float32(1e-3)


class NoiseTrainer:
    """Stands where `Trainer` stands."""

    def __init__(self, base: Any, task: Any, job: Any, client: Any, train: Any, progress: Any) -> None:
        self.examples, self.job, self.client = train, job, client
        self.contexts: dict[str, Any] = {}
        self.steps, self.checkpoint = SimpleNamespace(micro=0), None
        self.start: Tensors = {}

    def prepare(self, arrived: Tensors, start: Tensors, down: dict[str, Tensors]) -> None:
        """Remember where training starts."""
        self.start = start

    def train(self) -> Tensors:
        """The start plus noise that depends on device and round."""
        time.sleep(float(os.environ.get("RANKFLEET_NOISE_S", 0)))
        size = sum(t.size for t in self.start.values())
        at = seed_of(self.client.device, self.job.round) % (len(_TABLE) - size)
        moved = {}
        for name, tensor in self.start.items():
            moved[name] = tensor + _TABLE[at : at + tensor.size].reshape(tensor.shape)
            at += tensor.size
        return moved

    def look(self, hook: str) -> None:
        """No method looks at noise."""

    def measure(self, examples: Any, tensors: Any = None) -> dict[str, float]:
        """Nothing is measured."""
        return {"loss": 1.0, "square": 1.0, "correct": 0.0, "count": 1.0}


class NoBase:
    """Stands where `Base` stands: a model that is not there, as far as a round looks at it."""

    core = prefix = model = None
    transposed, device = False, "cpu"
    sites: ClassVar[dict[str, Any]] = {}

    def place(self, spec: Any, tensors: Any, carry: Any = None) -> None:
        """No map takes an adapter."""

    def clear(self) -> None:
        """Nothing was put in."""

    def lighten(self) -> None:
        """Nothing lies in memory."""


class NoiseRound(rounds.LocalRound):
    """A round with the stand-in."""

    trains_with = NoiseTrainer


class NoiseWorker(rounds.Worker):
    """A worker without base and examples."""

    round = NoiseRound

    def _prepared(self, order: Order, job: Any, view: Any) -> Any:
        return NoBase()

    def _examples(self, order: Order, job: Any) -> Any:
        return None, [{}] * 32, [{}], SimpleNamespace(unknown=0)


if __name__ == "__main__":
    __main__.main(NoiseWorker)
