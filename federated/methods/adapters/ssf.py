"""SSF: scale and shift what every map puts out: y ← γ∘y + β (Lian, Zhou, Feng, Wang, 2022, eq. 1).

Two numbers a channel. γ = 1 and β = 0 at the start (theirs has a little noise), so that round 0 is the
base. What is trained is γ - 1. For one input, averaging γ and β of one map averages its outputs.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any, ClassVar

import numpy as np

from ...contract.contexts import Ask, ServerContext, StepContext, Tensor, Torch
from ...contract.method import Method
from ...contract.places import Places
from ...contract.spec import Spec


class Ssf(Method, frozen=True):
    """`tensors` declares γ - 1 and β, `attach` puts them behind every map."""

    evidence: ClassVar[str] = "toy-checked"
    use_when: ClassVar[str] = "bytes decide: fewer numbers than any pair of rank 1"

    shift: bool = True
    """Train β too."""

    def plan(self, ask: Ask, device: str, ctx: ServerContext) -> Ask:
        """Maps without factors of their own."""
        return {**ask, "rank": 0}

    def tensors(self, spec: Spec, ctx: ServerContext) -> dict[str, Tensor]:
        """Zeros: they change nothing."""
        kinds = ("scale", "shift") if self.shift else ("scale",)
        return {
            f"{name}.{kind}": Tensor(np.zeros(p.out, np.float32))
            for name, p in spec.pairs.items()
            for kind in kinds
        }

    def attach(self, model: Places, spec: Spec, ctx: StepContext | None) -> None:
        """Behind every map."""
        for name in spec.pairs:
            model.after(name, partial(self.tuned, name))

    def tuned(self, name: str, y: Torch, x: Torch, p: Mapping[str, Torch], layout: Any) -> Torch:
        """γ∘y + β."""
        y = y + y * p[f"{name}.scale"].to(y.dtype)
        return y + p[f"{name}.shift"].to(y.dtype) if self.shift else y
