"""`--data`: somebody's own labelled text, split by the hash of each example."""

import hashlib
import json
from typing import Any

from rankfleet.edge_agent.config import Dataset
from rankfleet.edge_agent.worker.data import rows
from rankfleet.federated.errors import ConfigError

MAX_LABELS = 64


def split(path: str, text: str, label: str) -> tuple[list[dict[str, Any]], list[dict[str, Any]], str]:
    """(train, test, SHA-256): every fifth example by hash is for testing. Raises RankfleetError."""
    found: dict[str, dict[str, Any]] = {}
    for row in rows(Dataset(path), "data"):
        if text not in row or label not in row:
            raise ConfigError(
                f"{path} has columns {', '.join(map(str, row))}; `{text}` and `{label}` are wanted",
                "name them with --text and --label",
            )
        found[str(row[text])] = {"text": str(row[text]), "label": str(row[label])}
    labels = {r["label"] for r in found.values()}
    if not 2 <= len(labels) <= MAX_LABELS:
        raise ConfigError(f"{path} has {len(labels)} labels; 2 to {MAX_LABELS} make a classification task")
    keyed = sorted((hashlib.sha256(t.encode()).digest(), r) for t, r in found.items())
    test = [r for k, r in keyed if k[0] % 5 == 0]
    train = [r for k, r in keyed if k[0] % 5]
    digest = hashlib.sha256(json.dumps([train, test], sort_keys=True).encode()).hexdigest()
    return train, test, digest
