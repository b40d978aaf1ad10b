"""What a job can learn, as both sides must know it without torch: one file per task, its name is the
registration.

`federated/tasks/<kind>.py` says which plain tensors the task trains beside the factors;
`edge_agent/tasks/<kind>.py` loads rows and makes batches. Third parties add a task through the entry-point
group `rankfleet.tasks` (`name = "package.module"`, with `TASK` in it, whose `engine` names the module with
the class `Engine`).
"""

import importlib
import importlib.metadata
from functools import cache
from pathlib import Path

import msgspec

from ..errors import ConfigError


class TaskKind(msgspec.Struct, frozen=True):
    """`rows`: rows of the head that is trained beside the factors, 0 for none, -1 for one a label."""

    rows: int
    causal: bool = False
    """Does it need a causal language model?"""
    field: str = "text"
    """The column that a plain line of input stands for."""
    engine: str = ""
    """Import path of its module on devices; empty for `rankfleet.edge_agent.tasks.<kind>`."""

    @property
    def labelled(self) -> bool:
        """Has a job to list the labels?"""
        return self.rows < 0


@cache
def modules() -> dict[str, str]:
    """Task name → import path."""
    files = sorted(Path(__file__).parent.glob("*.py"))
    rows = {p.stem: f"{__package__}.{p.stem}" for p in files if not p.stem.startswith("_")}
    for point in importlib.metadata.entry_points(group="rankfleet.tasks"):
        rows.setdefault(point.name, point.value)
    return rows


@cache
def task_kind(name: str) -> TaskKind:
    """What a task is. Raises ConfigError for one that is not known."""
    if name not in modules():
        raise ConfigError(f"task `{name}` is not known", f"one of {', '.join(modules())}")
    kind: TaskKind = importlib.import_module(modules()[name]).TASK
    return kind


def head_shapes(name: str, labels: int, hidden: int) -> dict[str, tuple[int, ...]]:
    """Tensor name → shape. Raises ConfigError for an unknown task, and for labels that are missing or mean
    nothing."""
    kind = task_kind(name)
    if kind.labelled and not labels:
        raise ConfigError(f"task `{name}` needs `labels`, in the order of the head's rows")
    if not kind.labelled and labels:
        raise ConfigError(f"task `{name}` has no labels", "remove `task.labels`")
    rows = labels if kind.labelled else kind.rows
    return {"head.bias": (rows,), "head.weight": (rows, hidden)} if rows else {}
