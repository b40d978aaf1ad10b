"""FedAdam: treat the averaged update as a gradient and let Adam take the step (Reddi et al., 2021,
algorithm 2).

m ← β₁m + (1-β₁)Δ, v ← β₂v + (1-β₂)Δ², x ← x + η·m/(√v + τ), without bias correction, as in the paper.
Moments need coordinates that persist, hence factor space.
"""

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar

import numpy as np
from msgspec import Meta

from ...contract.contexts import ServerContext
from ...contract.method import Method
from ...contract.tensors import Tensors, fill


class FedAdam(Method, frozen=True):
    """`step`: Adam on the aggregate."""

    space: ClassVar[str] = "factors"
    evidence: ClassVar[str] = "toy-checked"
    use_when: ClassVar[str] = "plain averaging is slow, ranks are equal, and a server rate can be tuned"

    lr: Annotated[float, Meta(gt=0, le=10, description="server rate η")] = 0.01
    beta1: Annotated[float, Meta(ge=0, lt=1, description="decay of the mean")] = 0.9
    beta2: Annotated[float, Meta(ge=0, lt=1, description="decay of the square")] = 0.99
    tau: Annotated[float, Meta(gt=0, description="adaptivity τ")] = 1e-3

    def step(self, change: Mapping[str, Any], ctx: ServerContext) -> Tensors:
        """η·m/(√v + τ), by name; names that come and go keep their moments."""
        moments: dict[str, Tensors] = ctx.state
        m = {
            k: self.beta1 * t + (1 - self.beta1) * change[k]
            for k, t in fill(moments.get("m"), change).items()
        }
        v = {
            k: self.beta2 * t + (1 - self.beta2) * change[k] ** 2
            for k, t in fill(moments.get("v"), change).items()
        }
        ctx.state["m"], ctx.state["v"] = {**moments.get("m", {}), **m}, {**moments.get("v", {}), **v}
        return {k: (self.lr * m[k] / (np.sqrt(v[k]) + self.tau)).astype(np.float32) for k in change}
