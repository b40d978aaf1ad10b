"""Methods of tests that serve or carry something, loaded by name."""

from typing import Any, ClassVar

import numpy as np

from rankfleet.federated.contract.contexts import ClientContext, ServerContext
from rankfleet.federated.contract.method import Method
from rankfleet.federated.contract.tensors import Tensors
from rankfleet.federated.contract.update import LowRank


class Served(Method, frozen=True):
    """Serves a head of zeros, or lets every map carry the same further pair of rank 1."""

    space: ClassVar[str] = "factors"  # type: ignore[assignment]
    use_when: ClassVar[str] = "in tests"

    carries: bool = False

    def serve(self, adapter: Tensors, ctx: ClientContext) -> Tensors:
        """Zeros in place of the head: log(labels) is its loss."""
        return (
            adapter
            if self.carries
            else {k: 0 * t if k.startswith("head.") else t for k, t in adapter.items()}
        )

    def step(self, change: dict[str, Any], ctx: ServerContext) -> dict[str, Any]:
        """0.1 in every entry of the map, once."""
        if self.carries and ctx.round.number == 0:
            assert ctx.adapter is not None
            for module, pair in ctx.adapter.pairs.items():
                b, a = np.full((len(pair.B), 1), 0.1, np.float32), np.ones((1, pair.A.shape[1]), np.float32)
                ctx.carry[module] = LowRank(b, a)
        return change
