"""The embedding rows that a device's texts use. A mapped table would bring a page and its neighbours into
memory for every word of them."""

from collections.abc import Callable

import torch
from torch import Tensor


class Words:
    """Rows by token id, read when they are first asked for. `read` maps the table (vocabulary, hidden)
    anew, so that it leaves memory."""

    def __init__(self, read: Callable[[], Tensor]) -> None:
        self._read = read
        table = read()
        self._rows = table.new_empty(0, table.shape[1])
        self._place = torch.full((table.shape[0],), -1, dtype=torch.int32)

    def __len__(self) -> int:
        return len(self._rows)

    def take(self, ids: Tensor) -> Tensor:
        """Rows (n, hidden) of the ids (n,). Raises IndexError for one that the table does not have."""
        places = self._place.index_select(0, ids)
        if bool((places < 0).any()):
            self.read(ids)
            places = self._place.index_select(0, ids)
        return self._rows.index_select(0, places)

    def forget(self) -> None:
        """Let go of all of them."""
        self._rows = self._rows[:0].clone()
        self._place.fill_(-1)

    def read(self, ids: Tensor) -> None:
        """Make sure that these are there: one reading for all the texts of a round is cheaper than one a
        batch."""
        new: Tensor = ids.unique()  # type: ignore[no-untyped-call]
        new = new[self._place.index_select(0, new) < 0]
        if not len(new):
            return
        found = self._read().index_select(0, new)
        self._place[new] = torch.arange(len(self._rows), len(self._rows) + len(new), dtype=torch.int32)
        self._rows = torch.cat([self._rows, found])
