"""Tasks: the file name is the registration, on both sides."""

import subprocess
import sys
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest

from rankfleet.edge_agent.tasks import engine
from rankfleet.federated import tasks
from rankfleet.federated.errors import ConfigError, Refused
from rankfleet.federated.wire.messages import Task

ROOT = Path(__file__).parents[2]


def test_every_kind_has_an_engine_of_its_name() -> None:
    assert sorted(tasks.modules()) == [
        "causal_lm",
        "image_classification",
        "text_classification",
        "text_regression",
    ]
    for kind in tasks.modules():
        assert (ROOT / "edge_agent" / "tasks" / f"{kind}.py").exists()


def test_the_coordinator_knows_them_without_torch() -> None:
    use = "from rankfleet.federated.tasks import head_shapes; head_shapes('causal_lm', 0, 8)"
    code = f"import sys; {use}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False, cwd=ROOT).returncode == 0


def test_head_shapes() -> None:
    assert tasks.head_shapes("text_classification", 3, 8) == {"head.bias": (3,), "head.weight": (3, 8)}
    assert tasks.head_shapes("text_regression", 0, 8) == {"head.bias": (1,), "head.weight": (1, 8)}
    assert tasks.head_shapes("causal_lm", 0, 8) == {}
    for kind, labels in (("image_classification", 0), ("causal_lm", 2), ("haiku", 0)):
        with pytest.raises(ConfigError):
            tasks.head_shapes(kind, labels, 8)


def test_a_task_of_a_foreign_package(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "haiku_task.py").write_text(
        "from rankfleet.federated.tasks import TaskKind\nTASK = TaskKind(rows=1, engine='haiku_engine')\n"
    )
    (tmp_path / "haiku_engine.py").write_text(
        "class Engine:\n    def __init__(self, task, folder):\n        self.fields = ['text']\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    theirs = EntryPoint("haiku", "haiku_task", "rankfleet.tasks")
    monkeypatch.setattr("importlib.metadata.entry_points", lambda group: [theirs])
    tasks.modules.cache_clear()
    try:
        assert tasks.head_shapes("haiku", 0, 8)["head.bias"] == (1,)
        assert engine(Task("d", "haiku", []), "").fields == ["text"]
        with pytest.raises(Refused, match="it knows causal_lm, .*, haiku"):
            engine(Task("d", "sonnet", []), "")
    finally:
        tasks.modules.cache_clear()
