"""The owner's data: read rows, drop duplicates, keep a tenth aside by content, count what has no known
label."""

import csv
import gzip
import hashlib
import json
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from rankfleet.federated.errors import Refused

from ..config import Dataset

MAX_UNKNOWN = 0.1
Row = dict[str, Any]


class Shard:
    """Labelled rows of one dataset: `train` and `held` (a tenth, chosen by hash, so that it stays aside as
    data grow)."""

    def __init__(
        self,
        dataset: Dataset,
        name: str,
        fields: list[str],
        labels: list[str],
        optional: Collection[str] = (),
    ) -> None:
        self.train: list[Row] = []
        self.held: list[Row] = []
        self.unknown = self.duplicates = 0
        number = {label: i for i, label in enumerate(labels)}
        found: dict[bytes, Row] = {}
        for row in rows(dataset, name):
            item = {
                f: _column(row, dataset.columns.get(f, f), name, dataset.path)
                for f in fields
                if f not in optional or dataset.columns.get(f, f) in row
            }
            key = hashlib.sha256(json.dumps(item, sort_keys=True, default=str).encode()).digest()
            if key in found:
                self.duplicates += 1
                continue
            if labels:
                said = str(item["label"])
                said = dataset.labels.get(said, said)
                if said not in number:
                    self.unknown += 1
                    continue
                item["label"] = number[said]
            found[key] = item
        # In the order of the hash: the first n are a fair sample, whatever the order of the file.
        for key, item in sorted(found.items()):
            (self.held if int.from_bytes(key[:4], "big") % 10 == 0 else self.train).append(item)
        total = len(self.train) + len(self.held) + self.unknown
        if self.unknown > MAX_UNKNOWN * total:
            raise Refused(
                f"dataset `{name}`: {self.unknown} of {total} examples have a label that the job does not "
                "know",
                f"map them under `datasets.{name}.labels`; the job's labels are {', '.join(labels[:12])}",
            )
        if not self.train:
            raise Refused(f"dataset `{name}`: no example to train on in {dataset.path}")


def _column(row: Row, column: str, name: str, path: str) -> Any:
    if column not in row:
        raise Refused(
            f"dataset `{name}`: {path} has no column `{column}`; it has "
            f"{', '.join(map(str, list(row)[:12]))}",
            f"map it under `datasets.{name}.columns`",
        )
    return row[column]


def rows(dataset: Dataset, name: str) -> Iterator[Row]:
    """Rows of a JSONL, CSV or Parquet file or a hub dataset, as dictionaries. Raises Refused."""
    if dataset.path.startswith("hub:"):
        yield from _hub(dataset.path[4:], name)
        return
    path = Path(dataset.path)
    try:
        yield from read(path, name)
    except FileNotFoundError:
        raise Refused(f"dataset `{name}`: {path} does not exist", f"correct `datasets.{name}.path`") from None
    except (OSError, ValueError, csv.Error) as error:
        raise Refused(f"dataset `{name}`: {path}: {error}") from None


def read(path: Path, name: str) -> Iterator[Row]:
    """One file, by its ending."""
    if path.suffix in (".jsonl", ".json", ".ndjson") or path.name.endswith(".jsonl.gz"):
        with (
            gzip.open(path, "rt", encoding="utf-8")
            if path.suffix == ".gz"
            else path.open(encoding="utf-8") as lines
        ):
            for number, line in enumerate(lines, 1):
                if line.strip():
                    try:
                        row = json.loads(line)
                    except json.JSONDecodeError as error:
                        raise Refused(f"dataset `{name}`: {path}, line {number}: {error}") from None
                    if not isinstance(row, dict):
                        raise Refused(f"dataset `{name}`: {path}, line {number} is not an object")
                    yield row
    elif path.suffix in (".csv", ".tsv"):
        with path.open(encoding="utf-8", newline="") as lines:
            yield from csv.DictReader(lines, delimiter="\t" if path.suffix == ".tsv" else ",")
    elif path.suffix == ".parquet":
        try:
            import pyarrow.parquet as parquet
        except ImportError:
            raise Refused(
                f"dataset `{name}`: reading {path.name} needs pyarrow", "pip install pyarrow"
            ) from None
        path.stat()
        yield from parquet.read_table(path).to_pylist()
    else:
        raise Refused(f"dataset `{name}`: {path.name} is none of .jsonl, .jsonl.gz, .csv, .tsv, .parquet")


def _hub(repository: str, name: str) -> Iterator[Row]:
    """Files of a dataset repository whose names say `train`, or all of them."""
    try:
        from huggingface_hub import snapshot_download

        folder = Path(
            snapshot_download(
                repository, repo_type="dataset", allow_patterns=["*.parquet", "*.jsonl", "*.csv"]
            )
        )
    except Exception as error:
        raise Refused(f"dataset `{name}`: hub dataset {repository} cannot be had: {error}") from None
    files = sorted(p for p in folder.rglob("*") if p.suffix in (".parquet", ".jsonl", ".csv"))
    for path in [p for p in files if "train" in p.name] or files:
        yield from read(path, name)
