"""What a job can learn: one file per task. A task loads rows, makes batches, names its head and its
metric."""

import importlib
from typing import Any, Protocol

from rankfleet.federated.errors import Refused
from rankfleet.federated.tasks import modules, task_kind
from rankfleet.federated.wire.messages import Task


class TaskEngine(Protocol):
    """Between rows and the training loop; methods see only the batches, dictionaries of tensors."""

    fields: list[str]
    """Columns that rows have; those in an attribute `optional` may be missing."""

    def encode(self, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Rows as examples that `collate` can join."""

    def collate(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        """A batch: a dictionary of tensors with the key `labels`."""

    def features(self, base: Any, batch: dict[str, Any]) -> Any:
        """What the head reads, (batch, hidden). Raises Refused where scores are of tokens."""

    def forward(self, base: Any, head: dict[str, Any], batch: dict[str, Any]) -> Any:
        """Scores of a batch, from a `Base` and the head's tensors."""

    def losses(self, scores: Any, batch: dict[str, Any]) -> Any:
        """Loss of every example, (batch,)."""

    def correct(self, scores: Any, batch: dict[str, Any]) -> Any:
        """1.0 where the metric counts an example as right, (batch,)."""


def engine(task: Task, folder: str) -> TaskEngine:
    """The engine of a task for a base model in `folder`. Raises Refused for an unknown kind."""
    if task.kind not in modules():
        raise Refused(f"task `{task.kind}` is not known to this agent", f"it knows {', '.join(modules())}")
    path = task_kind(task.kind).engine or f"{__package__}.{task.kind}"
    made: TaskEngine = importlib.import_module(path).Engine(task, folder)
    return made
