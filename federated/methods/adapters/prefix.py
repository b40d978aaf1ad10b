"""Prompt and deep prefix tuning: trained rows stand before every text (Lester et al., 2021; Li & Liang,
2021).

Shallow: `length` rows before the first layer. Deep: in every layer those rows are replaced by the layer's
own, as in VPT-Deep (Jia et al., 2022), so that keys and values of the prefix are W_k and W_v of trained
rows; Li and Liang train keys and values themselves.
"""

from collections.abc import Mapping
from functools import partial
from typing import Annotated, Any, ClassVar

import numpy as np
from msgspec import Meta

from ...contract.contexts import Ask, ServerContext, StepContext, Tensor, Torch
from ...contract.method import Method
from ...contract.places import Places
from ...contract.spec import Spec


class Prefix(Method, frozen=True):
    """`tensors` declares the rows, `attach` puts them in front."""

    evidence: ClassVar[str] = "toy-checked"
    use_when: ClassVar[str] = "the model must stay as it is, and an adapter may have a few kilobytes"

    length: Annotated[int, Meta(ge=1, le=512, description="rows before every text")] = 4
    deep: bool = False
    """Rows of its own in every layer."""

    def plan(self, ask: Ask, device: str, ctx: ServerContext) -> Ask:
        """Maps without factors of their own."""
        return {**ask, "rank": 0}

    def tensors(self, spec: Spec, ctx: ServerContext) -> dict[str, Tensor]:
        """Small and random."""
        width = min(p.in_ for p in spec.pairs.values())
        return {
            f"prefix.{n}": Tensor(0.1 * ctx.rng.standard_normal((self.length, width), dtype=np.float32))
            for n in self.layers(spec)
        }

    def attach(self, model: Places, spec: Spec, ctx: StepContext | None) -> None:
        """Before the first layer; with `deep`, in every other anew."""
        first, *others = self.layers(spec)
        model.front(self.length, lambda p: p[f"prefix.{first}"])
        for layer in others:
            model.enter(layer, partial(self.renewed, layer))

    def layers(self, spec: Spec) -> range:
        """Layers with rows of their own, from the first one on."""
        return range(1 + max(p.layer for p in spec.pairs.values()) if self.deep else 1)

    def renewed(self, layer: int, x: Torch, p: Mapping[str, Torch], layout: Any) -> Torch:
        """The first rows of every text become the layer's own."""
        import torch

        block = layout.spread(x)
        rows = p[f"prefix.{layer}"].to(x.dtype).expand(layout.batch, -1, -1)
        return layout.rows_of(torch.cat([rows, block[:, self.length :]], dim=1))
