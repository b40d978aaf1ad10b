"""FedAvgM: momentum on the averaged update (Hsu, Qi, Brown, 2019, "Measuring the effects of non-identical
data distribution", section 3.3).

v ← βv + Δ, x ← x + ηv. The momentum needs coordinates that persist, hence factor space. β = 0 and η = 1 is
plain averaging.
"""

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar

import numpy as np
from msgspec import Meta

from ...contract.contexts import ServerContext
from ...contract.method import Method
from ...contract.tensors import Tensors, fill


class FedAvgM(Method, frozen=True):
    """`step`: momentum on the aggregate."""

    space: ClassVar[str] = "factors"
    evidence: ClassVar[str] = "toy-checked"
    use_when: ClassVar[str] = (
        "rounds are noisy because few devices take part or their data differ, and ranks are equal"
    )

    lr: Annotated[float, Meta(gt=0, le=10, description="server rate η")] = 1.0
    beta: Annotated[float, Meta(ge=0, lt=1, description="momentum β")] = 0.9

    def step(self, change: Mapping[str, Any], ctx: ServerContext) -> Tensors:
        """η·v, by name; names that come and go keep their momentum."""
        before: Tensors = ctx.state.get("v", {})
        v = {k: (self.beta * t + change[k]).astype(np.float32) for k, t in fill(before, change).items()}
        ctx.state["v"] = {**before, **v}
        return {k: np.float32(self.lr) * t for k, t in v.items()}
