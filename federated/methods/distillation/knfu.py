"""KnFu: devices exchange predictions on public texts, and each learns from those whose data are like its
own (Seyedmohammadi et al., 2024).

K_i (texts, labels) are a device's predictions after training, p_i their mean; the coordinator gives device
i F_i = Σ_j a_ij K_j with a_ij ∝ exp(-β·KL(p_i ‖ p_j)), and the device trains on CE + λT²·KL(F_i ‖ f_i),
one batch of public texts beside each of its own. No weight travels: every device keeps its own adapter,
and the job's version stays what it was. Reconstructed: the exponential form; p_i from K_i, where they tell
label counts; who is away counts with what it last said.
"""

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
from msgspec import Meta

from ...contract.contexts import ClientContext, ServerContext, StepContext, Torch
from ...contract.method import Method
from ...contract.tensors import Array, Tensors
from ...contract.update import Update


class KnFu(Method, frozen=True):
    """`trained` predicts, `reduce` fuses, `offer` gives each device its own, `loss` learns from it."""

    space: ClassVar[str] = "factors"
    needs_all: ClassVar[bool] = True
    tells: ClassVar[Literal["", "public", "private"]] = "private"
    evidence: ClassVar[str] = "toy-checked"
    use_when: ClassVar[str] = (
        "weights must not leave, and there are a few hundred public texts; classifiers alone"
    )
    example: ClassVar[dict[str, Any]] = {"texts": ["red sun", "cat dog bird", "tree rock", "moon star"]}

    texts: Annotated[
        tuple[str, ...], Meta(max_length=2000, description="public texts; they travel in every assignment")
    ] = ()
    beta: Annotated[float, Meta(ge=0, description="β, how near a device must be to count")] = 10.0
    weight: Annotated[float, Meta(ge=0, description="λ, of the fused predictions")] = 1.0
    heat: Annotated[float, Meta(gt=0, description="T, temperature of predictions")] = 1.0

    def travels(self, name: str, ctx: ClientContext) -> bool:
        """No weights."""
        return False

    def offer(self, adapter: Tensors, device: str, ctx: ServerContext) -> Tensors:
        """F_i, once there is one."""
        if "fused" in ctx.of(device):
            ctx.down["fused"] = ctx.of(device)["fused"]
        return adapter

    def loss(
        self, loss: Torch, params: Mapping[str, Torch], batch: dict[str, Torch], ctx: StepContext
    ) -> Torch:
        """+ λT²·KL(F ‖ f) on as many public texts as the batch has examples, drawn."""
        if "fused" not in ctx.down:
            return loss
        import torch
        from torch.nn.functional import kl_div

        drawn = torch.randperm(len(self.texts), generator=ctx.generator)[: len(batch["labels"])]
        scores = ctx.scores(params, self.public(drawn.tolist(), ctx)) / self.heat
        goal = ctx.down["fused"][drawn.to(scores.device)]
        return loss + self.weight * self.heat**2 * kl_div(scores.log_softmax(-1), goal, reduction="batchmean")

    def public(self, chosen: Sequence[int], ctx: StepContext) -> dict[str, Torch]:
        """Some of the public texts as a batch."""
        return ctx.collate(ctx.encode([{"text": self.texts[n], "label": 0} for n in chosen]))

    def trained(self, params: Mapping[str, Torch], ctx: StepContext) -> Tensors:
        """K_i, fp16."""
        import torch

        if not self.texts:
            return {}
        with torch.no_grad():
            scores = [
                ctx.scores(params, part) for part in ctx.split(self.public(range(len(self.texts)), ctx), 32)
            ]
        return {"predicted": (torch.cat(scores) / self.heat).softmax(-1).cpu().numpy().astype(np.float16)}

    def reduce(self, updates: Sequence[Update], ctx: ServerContext) -> Tensors:
        """F_i for every device that was ever heard; the adapter stays."""
        for update in updates:
            predicted = update.extra_of(self).get("predicted")
            if predicted is not None and predicted.ndim == 2 and len(predicted) == len(self.texts):
                ctx.of(update.device)["predicted"] = predicted
                ctx.state["devices"] = sorted({*ctx.state.get("devices", []), update.device})
        if devices := ctx.state.get("devices", []):
            predicted = np.array([ctx.of(d)["predicted"] for d in devices], np.float64)
            for device, target in zip(
                devices, np.tensordot(shares(predicted, self.beta), predicted, 1), strict=True
            ):
                ctx.of(device)["fused"] = target.astype(np.float32)
        return {}


def shares(predicted: Array, beta: float) -> Array:
    """a (devices, devices), rows that sum to 1, of predictions (devices, texts, labels)."""
    p = predicted.mean(1) + 1e-6
    far = (p[:, None] * np.log(p[:, None] / p[None])).sum(-1)
    near = np.exp(-beta * far)
    return np.asarray(near / near.sum(1, keepdims=True))
