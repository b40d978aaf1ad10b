"""Just one byte: zeroth-order steps along seeded directions, one signed log code a batch (Zelikman et al.,
2023).

g = (L(θ + εz) - L(θ - εz)) / 2ε for z ~ N(0, I) of (round, device, batch); everybody applies θ ← θ -
(η/|M|) Σ g z. A code is a sign and seven bits of ln|g| in [-10, 4] (their released code sends the float).
θ stays where it is within a round, and the coordinator relays.
"""

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
from msgspec import Meta

from ...contract.contexts import ServerContext, StepContext, Torch
from ...contract.method import Method
from ...contract.tensors import Tensors
from ...contract.update import Update

LOW, HIGH, LEVELS = -10.0, 4.0, 126


class JustOneByte(Method, frozen=True):
    """`train` measures, nothing but codes travels, `reduce` walks."""

    space: ClassVar[str] = "factors"  # type: ignore[assignment]
    tells: ClassVar[Literal["", "public", "private"]] = "private"
    evidence: ClassVar[str] = "toy-checked"
    use_when: ClassVar[str] = "devices can only run the model forwards, or the link takes a byte a step"

    eps: Annotated[float, Meta(gt=0, description="ε, half of the distance between the two looks")] = 1e-2
    lr: Annotated[float, Meta(gt=0, description="η, the coordinator's step")] = 0.05

    def train(self, start: dict[str, Torch], ctx: StepContext) -> dict[str, Torch]:
        """Two looks a batch; no graph is made."""
        import torch

        def loss(z: Tensors, sign: int, batch: dict[str, Torch]) -> float:
            return float(
                ctx.task_loss({k: p + sign * self.eps * p.new_tensor(z[k]) for k, p in start.items()}, batch)
            )

        codes = []
        with torch.no_grad():
            for number, batch in enumerate(ctx.batches()):
                z = directions(start, ctx.round.number, ctx.device, number)
                codes.append(code((loss(z, 1, batch) - loss(z, -1, batch)) / (2 * self.eps)))
        ctx.up["codes"] = np.array(codes, np.int8)
        return {}

    def reduce(self, updates: list[Update], ctx: ServerContext) -> Tensors:  # type: ignore[override]
        """-(η/|M|) Σ g z over all codes of all devices."""
        like = {k: np.empty(s, np.float32) for u in updates for k, s in u.spec.shapes().items()}
        total, count = {k: np.zeros(t.shape) for k, t in like.items()}, 0
        for u in updates:
            codes = u.extra_of(self).get("codes", np.zeros(0, np.int8)).tolist()
            count += len(codes)
            for number, byte in enumerate(codes):
                for k, z in directions(like, ctx.round.number - u.age, u.device, number).items():
                    total[k] += slope(byte) * z
        return {k: (-self.lr / max(1, count) * t).astype(np.float32) for k, t in total.items()}


def code(g: float) -> int:
    """Sign and seven bits of ln|g|; 0 for less than e⁻¹⁰."""
    size = np.log(abs(g)) if g else -np.inf
    return 0 if size < LOW else int(np.sign(g)) * (1 + round((min(size, HIGH) - LOW) / (HIGH - LOW) * LEVELS))


def slope(byte: int) -> float:
    """The inverse of `code`, to half a level: 6% of |g|."""
    return 0.0 if byte == 0 else float(np.sign(byte) * np.exp(LOW + (abs(byte) - 1) / LEVELS * (HIGH - LOW)))


def directions(like: Mapping[str, Any], round: int, device: str, batch: int) -> Tensors:
    """z by name, the same on every machine."""
    rng = np.random.Generator(np.random.Philox(np.random.SeedSequence([round, batch, *device.encode()])))
    return {k: rng.standard_normal(tuple(like[k].shape), dtype=np.float32) for k in sorted(like)}
