"""Decoded updates: kept as long as there is room, and decoded again where there is not."""

import itertools
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping

from rankfleet.federated.contract.tensors import Array, Tensors

PINNED_MB, RECENT_MB = 20, 28
"""Decoded updates that are kept for every pass, and those that were looked at last."""


class Keeper:
    """Decoded updates: the first ones stay, of the others the last ones, so that passes in the same order
    profit."""

    def __init__(self, pinned_mb: float = PINNED_MB, recent_mb: float = RECENT_MB) -> None:
        self.keys = itertools.count()
        self.pinned: dict[int, Tensors] = {}
        self.recent: OrderedDict[int, Tensors] = OrderedDict()
        self._free, self._room = pinned_mb * 1e6, recent_mb * 1e6
        self._held = 0

    def get(self, key: int, make: Callable[[], Tensors]) -> Tensors:
        """What `make` gives, from memory where it is."""
        if (held := self.pinned.get(key) or self.recent.get(key)) is not None:
            return held
        made = make()
        size = sum(t.nbytes for t in made.values())
        if size <= self._free:
            self._free -= size
            self.pinned[key] = made
            return made
        self.recent[key] = made
        self._held += size
        while self._held > self._room and len(self.recent) > 1:
            _, old = self.recent.popitem(last=False)
            self._held -= sum(t.nbytes for t in old.values())
        return made


class Decoded(Mapping[str, Array]):
    """The deltas of one stored update."""

    def __init__(self, keeper: Keeper, make: Callable[[], Tensors]) -> None:
        self._keeper, self._make, self._key = keeper, make, next(keeper.keys)

    def load(self) -> Tensors:
        """All of them. Raises WireError."""
        return self._keeper.get(self._key, self._make)

    def __getitem__(self, name: str) -> Array:
        return self.load()[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.load())

    def __len__(self) -> int:
        return len(self.load())
