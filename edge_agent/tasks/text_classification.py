"""One label for one text: mean-pooled last hidden state, then a linear head."""

from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import cross_entropy, linear

from rankfleet.federated.wire.messages import Task

from .tokens import Tokens


class Engine:
    """Rows have `text` and `label` (a number)."""

    def __init__(self, task: Task, folder: str) -> None:
        self.fields = ["text", "label"]
        self.length = task.max_length
        self.template = task.template or "{text}"
        self.tokens = Tokens(Path(folder))

    def encode(self, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Token ids, cut at the job's length."""
        texts = [self.template.replace("{text}", str(r["text"])) for r in rows]
        ids = self.tokens.ids(texts, self.length)
        return [{"ids": i, "label": r.get("label", 0)} for i, r in zip(ids, rows, strict=True)]

    def collate(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        """Right-padded to the longest of the batch."""
        longest = max(len(e["ids"]) for e in examples)
        ids = torch.zeros(len(examples), longest, dtype=torch.long)
        mask = torch.zeros(len(examples), longest, dtype=torch.long)
        for row, e in enumerate(examples):
            ids[row, : len(e["ids"])] = torch.tensor(e["ids"])
            mask[row, : len(e["ids"])] = 1
        return {
            "input_ids": ids,
            "attention_mask": mask,
            "labels": torch.tensor([e["label"] for e in examples]),
        }

    def features(self, base: Any, batch: dict[str, Any]) -> torch.Tensor:
        """Mean of the last hidden states over real tokens, fp32 (batch, hidden)."""
        rows, layout = base.hidden(batch)
        features: torch.Tensor = base.headed(layout.means(rows))
        return features

    def forward(self, base: Any, head: dict[str, Any], batch: dict[str, Any]) -> torch.Tensor:
        """Scores (batch, labels)."""
        return linear(self.features(base, batch), head["head.weight"], head["head.bias"])

    def losses(self, scores: torch.Tensor, batch: dict[str, Any]) -> torch.Tensor:
        """Cross-entropy per example."""
        return cross_entropy(scores, batch["labels"].to(scores.device), reduction="none")

    def correct(self, scores: torch.Tensor, batch: dict[str, Any]) -> torch.Tensor:
        """Is the highest score the label's?"""
        right: torch.Tensor = (scores.argmax(-1) == batch["labels"].to(scores.device)).float()
        return right
