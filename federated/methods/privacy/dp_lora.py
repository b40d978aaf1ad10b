"""DP-LoRA: clip every example's gradient, then add noise: DP-SGD on the adapter (Liu et al., 2023; Abadi
et al., 2016).

g̃ = (1/|b|)(Σ_j g_j·min(1, C/‖g_j‖) + N(0, (zC)² I)), Abadi's algorithm 1. What is protected is one
example of this device. ε is that of T Gaussian steps by Rényi divergence (Mironov, 2017: T·a/(2z²) at
order a) without amplification by sampling: an upper bound.
"""

import math
from collections.abc import Mapping
from typing import Annotated, ClassVar

import numpy as np
from msgspec import Meta

from ...contract.contexts import ClientContext, StepContext, Torch
from ...contract.method import Method
from ...contract.tensors import Tensors

ORDERS = [1 + 0.05 * n for n in range(1, 4000)]


class DpLora(Method, frozen=True):
    """`gradient`: example by example; `send`: what it cost so far."""

    releases: ClassVar[bool] = True
    evidence: ClassVar[str] = "toy-checked"
    use_when: ClassVar[str] = "nobody may learn whether an example was there; best with few trained numbers"

    bound: Annotated[float, Meta(gt=0, description="C, most norm of an example's gradient")] = 1.0
    noise: Annotated[float, Meta(ge=0, description="z, deviation of the noise over C")] = 0.5
    delta: Annotated[float, Meta(gt=0, lt=1, description="δ")] = 1e-5

    def gradient(
        self, params: Mapping[str, Torch], batch: dict[str, Torch], ctx: StepContext
    ) -> tuple[float, dict[str, Torch]]:
        """Clipped gradients of single examples, summed, with noise, over the size of the batch."""
        import torch

        value, count = 0.0, len(batch["labels"])
        total = {k: torch.zeros_like(p) for k, p in params.items()}
        for example in ctx.split(batch):
            loss, grads = ctx.gradient(params, example)
            norm = float(torch.stack([g.norm() for g in grads.values()]).norm())
            for k, g in grads.items():
                total[k] += g * min(1.0, self.bound / (norm + 1e-12))
            value += loss / count
        ctx.state["steps"] = ctx.state.get("steps", 0) + 1
        deviation = self.noise * self.bound

        def private(t: Torch) -> Torch:
            return (t + deviation * torch.randn(t.shape, generator=ctx.generator).to(t.device)) / count

        return value, {k: private(t) for k, t in total.items()}

    def send(self, delta: Tensors, ctx: ClientContext) -> Tensors:
        """The delta is private already; ε so far travels beside it."""
        ctx.up["epsilon"] = np.array([self.epsilon(ctx.state.get("steps", 0))], np.float32)
        return delta

    def epsilon(self, steps: int) -> float:
        """ε at `delta` after so many steps; 10⁹ where there is no noise."""
        if not self.noise:
            return 1e9
        spent = (steps * a / (2 * self.noise**2) + math.log(1 / self.delta) / (a - 1) for a in ORDERS)
        return min(1e9, *spent) if steps else 0.0
