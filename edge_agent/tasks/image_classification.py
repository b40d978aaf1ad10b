"""One label for one image: the first token's last hidden state of a vision transformer, then a linear
head."""

from typing import Any

import torch
from torch.nn.functional import cross_entropy, linear

from rankfleet.federated.errors import Refused
from rankfleet.federated.wire.messages import Task


class Engine:
    """Rows have `pixels` (nested or flat list, channels first, 0 to 1) and `label` (a number)."""

    def __init__(self, task: Task, folder: str) -> None:
        from transformers import AutoConfig

        config: Any = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        self.fields = ["pixels", "label"]
        self.shape = (config.num_channels, config.image_size, config.image_size)

    def encode(self, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Pixels as fp32 arrays of the model's shape. Raises Refused for another size."""
        found = []
        for r in rows:
            pixels = torch.tensor(r["pixels"], dtype=torch.float32)
            if pixels.numel() != self.shape[0] * self.shape[1] * self.shape[2]:
                raise Refused(f"an image has {pixels.numel()} values, the model needs {self.shape}")
            found.append({"pixels": pixels.view(self.shape), "label": r.get("label", 0)})
        return found

    def collate(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        """Stacked images."""
        return {
            "pixel_values": torch.stack([e["pixels"] for e in examples]),
            "labels": torch.tensor([e["label"] for e in examples]),
        }

    def features(self, base: Any, batch: dict[str, Any]) -> torch.Tensor:
        """The first token's last hidden state, fp32 (batch, hidden)."""
        rows, layout = base.hidden(batch)
        features: torch.Tensor = base.headed(layout.spread(rows)[:, 0])
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
