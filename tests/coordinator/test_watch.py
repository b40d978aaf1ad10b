"""Progress where people look: the table, the picture, TensorBoard, MLflow; each read back."""

from pathlib import Path
from typing import Any

import pytest

from rankfleet.coordinator.verbs import sinks
from rankfleet.coordinator.verbs.sinks import Figures, MLflow, Picture, TensorBoard
from rankfleet.coordinator.verbs.watch import follow, screen
from rankfleet.federated.errors import ConfigError, Unreachable

ROWS = [Figures(n, 1e9 + n, 2.5, 3, 4, 1.0 / (n + 1), 0.9 / (n + 1), 0.5 + n / 20) for n in range(4)]


def answer(count: int, open_round: bool = True) -> dict[str, Any]:
    def device(name: str, state: str) -> dict[str, Any]:
        return {"device": name, "state": state, "arm": {"placement": "top(2, r=8)"}, "resumed": 0}

    rounds = [
        {
            "round": n, "state": "closed", "opened": 1e9 + n, "closed": 1e9 + n + 2.5,
            "info": {"loss": 1 / (n + 1), "arrived": 2, "invited": 2},
            "version": {"loss": 0.9, "accuracy": 0.5},
            "devices": [device("d0", "counted"), device("d1", "counted")],
        }
        for n in range(count)
    ]  # fmt: skip
    if open_round:
        devices = [device("d0", "received"), device("d1", "assigned")]
        rounds.append(
            {
                "round": count,
                "state": "open",
                "opened": 1e9,
                "closed": None,
                "info": {},
                "version": {},
                "devices": devices,
            }
        )
    return {"rounds": rounds, "live": {"d1": {"state": "sending", "chunks": [1, 3]}}}


class Fake:
    """An API that moves by one round with every look."""

    def __init__(self, total: int, gap: int = -1) -> None:
        self.total, self.looks, self.gap = total, 0, gap

    def get(self, path: str) -> Any:
        if path == "/jobs":
            self.looks += 1
            if self.looks == self.gap:
                raise Unreachable("gone")
            return [{"job": "j-1", "state": "finished" if self.looks > self.total else "running"}]
        return answer(min(self.looks, self.total), self.looks <= self.total)


def test_the_table_shows_rounds_and_what_devices_do() -> None:
    text = screen("j-1", "running", ROWS, answer(4)["rounds"][-1:], answer(4)["live"])
    assert "j-1: running, 4 rounds closed" in text
    assert "3/4" in text
    assert "0.2500" in text
    assert "sending 1/3" in text
    assert "no round has closed yet" in screen("j-1", "running", [], [], {})


def test_every_round_reaches_every_sink_once_even_over_a_restart() -> None:
    class Notes:
        def __init__(self) -> None:
            self.seen: list[int] = []
            self.closed = False

        def add(self, job: str, row: Figures) -> None:
            self.seen.append(row.round)
            if row.round == 1:
                raise OSError("disk full")

        def close(self) -> None:
            self.closed = True

    notes, said = Notes(), list[str]()
    state = follow(Fake(4, gap=3), "j-1", [notes], every_s=0, say=said.append)  # type: ignore[arg-type]
    assert state == "finished"
    assert notes.seen == [0, 1, 2, 3]
    assert notes.closed
    assert any("does not answer" in s for s in said)


def test_a_picture_is_replaced_after_every_round(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    sink, sizes = Picture(tmp_path / "job.png"), set()
    for row in ROWS:
        sink.add("j-1", row)
        data = (tmp_path / "job.png").read_bytes()
        assert data.startswith(b"\x89PNG")
        sizes.add(data)
    assert len(sizes) == len(ROWS)
    assert [p.name for p in tmp_path.iterdir()] == ["job.png"]


def test_tensorboard_reads_what_we_wrote(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    sink = TensorBoard(tmp_path)
    for row in ROWS:
        sink.add("j-1", row)
    sink.close()
    found = EventAccumulator(str(tmp_path / "j-1")).Reload()
    assert [(e.step, round(e.value, 4), e.wall_time) for e in found.Scalars("held_out_loss")] == [
        (r.round, round(r.held_out_loss or 0, 4), r.closed) for r in ROWS
    ]


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
def test_mlflow_goes_on_where_it_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    for rows in (ROWS[:2], ROWS):
        sink = MLflow(str(tmp_path / "runs"))
        for row in rows:
            sink.add("j-1", row)
    runs = sink.client.search_runs([sink.experiment])
    assert [r.data.tags["rankfleet_job"] for r in runs] == ["j-1"]
    history = sink.client.get_metric_history(runs[0].info.run_id, "train_loss")
    assert sorted((m.step, m.value) for m in history) == [(r.round, r.train_loss) for r in ROWS]


@pytest.mark.parametrize(
    ("make", "module"),
    [(lambda: Picture(Path("x")), "matplotlib"), (lambda: TensorBoard(Path("x")), "tensorboard")],
)
def test_what_is_not_installed_is_said(make: Any, module: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    for name in [m for m in sys.modules if m == module or m.startswith(module + ".")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ConfigError, match=f"pip install {module}"):
        make()


def test_figures_of_the_api() -> None:
    row = sinks.figures(answer(2)["rounds"][1])
    assert row == Figures(1, 1e9 + 3.5, 2.5, 2, 2, 0.5, 0.9, 0.5, 0)
    assert "held_out_loss" not in Figures(0, 0, 1, 1, 1).named()
