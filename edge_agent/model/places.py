"""Functions that methods put into the model: `rankfleet.federated.contract.places.Places`, as the engine
runs them."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from rankfleet.federated.contract.places import Function
from rankfleet.federated.errors import Conflict

from .ops.adapted import Site, apply
from .ops.layout import Layout


class Attached:
    """The functions of one round, and the point `p` whose tensors they read."""

    def __init__(self, sites: Mapping[str, Site]) -> None:
        self._sites = sites
        self.p: Mapping[str, Tensor] = {}
        self.seen: dict[str, Any] = {}
        self.count = 0
        """Rows in front of every text."""
        self._front: Function | None = None
        self._before: dict[str, list[Function]] = {}
        self._after: dict[str, list[Function]] = {}
        self._enter: dict[int, list[Function]] = {}
        self._pooled: list[Function] = []

    def before(self, name: str, f: Function) -> None:
        """See `Places`."""
        self._before.setdefault(self._known(name), []).append(f)

    def after(self, name: str, f: Function) -> None:
        """See `Places`."""
        self._after.setdefault(self._known(name), []).append(f)

    def enter(self, layer: int, f: Function) -> None:
        """See `Places`."""
        self._enter.setdefault(layer, []).append(f)

    def front(self, count: int, f: Function) -> None:
        """See `Places`. Raises Conflict for a second one."""
        if self._front is not None:
            raise Conflict("two methods of the stack put rows in front of every text", "keep one of the two")
        self.count, self._front = count, f

    def pooled(self, f: Function) -> None:
        """See `Places`."""
        self._pooled.append(f)

    def _known(self, name: str) -> str:
        if name not in self._sites:
            raise Conflict(
                f"a method attaches to the map `{name}`, which this model does not have",
                "take names from `spec.pairs`",
            )
        return name

    def apply(self, x: Tensor, sites: Sequence[Site], layout: Layout) -> list[Tensor]:
        """`adapted.apply` with the functions around it; maps that read what came in are still computed
        together."""
        together = [s for s in sites if s.name not in self._before]
        given = dict(zip([s.name for s in together], apply(x, together), strict=True)) if together else {}
        outputs = []
        for s in sites:
            read = x
            for f in self._before.get(s.name, ()):
                read = f(read, self.p, layout)
            y = given[s.name] if s.name in given else apply(read, [s])[0]
            for f in self._after.get(s.name, ()):
                y = f(y, read, self.p, layout)
            outputs.append(y)
        return outputs

    def entering(self, x: Tensor, layer: int, layout: Layout) -> Tensor:
        """What enters a layer."""
        for f in self._enter.get(layer, ()):
            x = f(x, self.p, layout)
        return x

    def headed(self, z: Tensor) -> Tensor:
        """What the head reads."""
        for f in self._pooled:
            z = f(z, self.p)
        return z

    def fronted(self, x: Tensor, layout: Layout) -> tuple[Tensor, Layout]:
        """Rows and layout with what stands in front."""
        if self._front is None:
            return x, layout
        rows = self._front(self.p).to(x.dtype)
        longer = Layout(
            torch.cat([torch.ones(layout.batch, self.count, dtype=torch.bool), layout.mask], dim=1),
            layout.device,
        )
        block = torch.cat([rows.expand(layout.batch, -1, -1), layout.spread(x)], dim=1)
        return longer.rows_of(block), longer

    def without(self, x: Tensor, longer: Layout, layout: Layout) -> Tensor:
        """Rows of the texts alone."""
        return layout.rows_of(longer.spread(x)[:, self.count :]) if self.count else x
