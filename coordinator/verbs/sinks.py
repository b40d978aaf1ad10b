"""Where the progress of a job can be looked at: a picture, TensorBoard, MLflow. Each takes one closed
round at a time.

They run in `coordinator watch`, not in the service: what they import and how they fail costs no round.
"""

import time
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import urlsplit

import msgspec

from rankfleet.federated.errors import ConfigError


class Figures(msgspec.Struct, frozen=True):
    """One closed round, as numbers. None where nobody measured."""

    round: int
    closed: float
    seconds: float
    arrived: int
    invited: int
    train_loss: float | None = None
    held_out_loss: float | None = None
    held_out_accuracy: float | None = None
    """Of the version that the round started from."""
    resumed: int = 0

    def named(self) -> dict[str, float]:
        """Name → value, of what there is."""
        return {
            k: float(v)
            for k, v in msgspec.structs.asdict(self).items()
            if v is not None and k not in ("round", "closed")
        }


def figures(row: dict[str, Any]) -> Figures:
    """A round of the API's answer."""
    info, version = row["info"], row["version"]
    return Figures(
        row["round"], row["closed"] or 0.0, round((row["closed"] or time.time()) - row["opened"], 3),
        int(info.get("arrived", 0)),
        int(info.get("invited", len(row["devices"]))), info.get("loss"), version.get("loss"),
        version.get("accuracy"),
        sum(d["resumed"] for d in row["devices"]),
    )  # fmt: skip


class Sink(Protocol):
    """Takes closed rounds in order."""

    def add(self, job: str, row: Figures) -> None:
        """One round."""

    def close(self) -> None:
        """Bring everything to where it belongs."""


class Picture:
    """Losses and accuracy over the rounds, as a PNG that is replaced after every round."""

    def __init__(self, file: Path) -> None:
        try:
            import matplotlib as mpl
        except ImportError:
            raise ConfigError("a picture needs matplotlib", "pip install matplotlib") from None
        mpl.use("Agg")
        self.file, self.rows = file, list[Figures]()

    def add(self, job: str, row: Figures) -> None:
        """Draw again."""
        from matplotlib import pyplot

        self.rows.append(row)
        figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
        for name, label in (
            ("train_loss", "after training, on the devices"),
            ("held_out_loss", "held out, version as received"),
        ):
            points = [(r.round, v) for r in self.rows if (v := getattr(r, name)) is not None]
            if points:
                left.plot(*zip(*points, strict=True), marker=".", label=label)
        left.set(xlabel="round", ylabel="loss", title=job)
        if left.lines:
            left.legend(fontsize=8)
        points = [(r.round, r.held_out_accuracy) for r in self.rows if r.held_out_accuracy is not None]
        if points:
            right.plot(*zip(*points, strict=True), marker=".", color="C2")
        right.set(
            xlabel="round",
            ylabel="held-out accuracy",
            ylim=(0, 1),
            title=f"{row.arrived} of {row.invited} devices, {row.seconds:.1f} s",
        )
        part = self.file.with_name(f".{self.file.name}.new.png")
        figure.savefig(part, dpi=100)
        pyplot.close(figure)
        part.replace(self.file)

    def close(self) -> None:
        """Nothing is left to do."""


class TensorBoard:
    """Event files that TensorBoard reads; a run of its own for every job."""

    def __init__(self, folder: Path) -> None:
        try:
            from tensorboard.summary.writer.event_file_writer import EventFileWriter
        except ImportError:
            raise ConfigError(
                "writing for TensorBoard needs the package tensorboard", "pip install tensorboard"
            ) from None
        self.folder, self._make, self._writers = folder, EventFileWriter, dict[str, Any]()

    def add(self, job: str, row: Figures) -> None:
        """One scalar for each figure, at the time when the round closed."""
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary

        if job not in self._writers:
            self._writers[job] = self._make(str(self.folder / job))
        values = [Summary.Value(tag=name, simple_value=value) for name, value in row.named().items()]
        self._writers[job].add_event(
            Event(wall_time=row.closed, step=row.round, summary=Summary(value=values))
        )
        self._writers[job].flush()

    def close(self) -> None:
        """Flush."""
        for writer in self._writers.values():
            writer.close()


class MLflow:
    """Metrics of one run per job on an MLflow server or in a folder; a run that is there already goes on."""

    def __init__(self, uri: str, experiment: str = "rankfleet") -> None:
        try:
            from mlflow.tracking import MlflowClient
        except ImportError:
            raise ConfigError(
                "writing for MLflow needs the package mlflow-skinny", "pip install mlflow-skinny"
            ) from None
        if not urlsplit(uri).scheme:
            uri = Path(uri).absolute().as_uri()
        self.client = MlflowClient(tracking_uri=uri)
        found = self.client.get_experiment_by_name(experiment)
        self.experiment = found.experiment_id if found else self.client.create_experiment(experiment)
        self._runs: dict[str, str] = {}
        self._done: dict[str, int] = {}

    def _run(self, job: str) -> str:
        if job not in self._runs:
            runs = self.client.search_runs([self.experiment], f"tags.rankfleet_job = '{job}'")
            run = (
                runs[0]
                if runs
                else self.client.create_run(self.experiment, tags={"rankfleet_job": job}, run_name=job)
            )
            self._runs[job] = run.info.run_id
            known = self.client.get_metric_history(run.info.run_id, "arrived") if runs else []
            self._done[job] = max((m.step for m in known), default=-1)
        return self._runs[job]

    def add(self, job: str, row: Figures) -> None:
        """One metric for each figure; rounds that the run has already are left out."""
        run = self._run(job)
        if row.round <= self._done[job]:
            return
        for name, value in row.named().items():
            self.client.log_metric(run, name, value, timestamp=int(row.closed * 1000), step=row.round)

    def close(self) -> None:
        """Nothing is left to do."""
