"""One number for one text: mean-pooled last hidden state, then a linear map. Loss: squared error."""

from typing import Any

import torch

from rankfleet.federated.errors import Refused
from rankfleet.federated.wire.messages import Task

from . import text_classification


class Engine(text_classification.Engine):
    """Rows have `text` and `value`."""

    def __init__(self, task: Task, folder: str) -> None:
        super().__init__(task, folder)
        self.fields = ["text", "value"]
        self.tolerance = task.tolerance

    def encode(self, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Token ids and fp32 targets. Raises Refused for a value that is no finite number."""
        found = super().encode(rows)
        for example, row in zip(found, rows, strict=True):
            try:
                example["label"] = float(row["value"])
            except (TypeError, ValueError):
                raise Refused(f"`value` of a row is {str(row['value'])[:40]!r}, which is no number") from None
            if not abs(example["label"]) < 1e30:
                raise Refused(f"`value` of a row is {example['label']}")
        return found

    def collate(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        """Right-padded; targets as fp32."""
        batch = super().collate(examples)
        return {**batch, "labels": batch["labels"].float()}

    def losses(self, scores: torch.Tensor, batch: dict[str, Any]) -> torch.Tensor:
        """Squared error per example."""
        error: torch.Tensor = (scores[:, 0] - batch["labels"].to(scores.device)).square()
        return error

    def correct(self, scores: torch.Tensor, batch: dict[str, Any]) -> torch.Tensor:
        """Is the prediction within the job's `tolerance`?"""
        right: torch.Tensor = (
            (scores[:, 0] - batch["labels"].to(scores.device)).abs() <= self.tolerance
        ).float()
        return right
