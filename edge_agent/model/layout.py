"""Where the real tokens of a batch lie. Everything but attention runs on real tokens alone, one row each: padding costs nothing there."""

from functools import cached_property

import torch
from torch import Tensor

from .pieces import pick, spread


class Layout:
    """A batch of `counts` tokens each, padded to `length` for attention."""

    def __init__(self, mask: Tensor) -> None:
        self.mask = mask.bool()
        self.batch, self.length = mask.shape
        self.counts = self.mask.sum(1)
        self.full = bool(self.mask.all())
        self.rows = None if self.full else self.mask.flatten().nonzero().squeeze(1)

    @staticmethod
    def of(counts: Tensor) -> "Layout":
        """Right-padded examples of so many tokens."""
        length = int(counts.max())
        return Layout(torch.arange(length, device=counts.device).unsqueeze(0) < counts.unsqueeze(1))

    @cached_property
    def positions(self) -> Tensor:
        """Each row's position in its example, (n,)."""
        return self.take((self.mask.cumsum(1) - 1).flatten())

    def take(self, padded: Tensor) -> Tensor:
        """(batch·length, …) → the real rows (n, …)."""
        return padded if self.rows is None else padded.index_select(0, self.rows)

    def spread(self, x: Tensor) -> Tensor:
        """Rows (n, …) → (batch, length, …), zeros where there is no token."""
        if self.rows is not None:
            x = spread(x, self.rows, self.batch * self.length)
        return x.view(self.batch, self.length, *x.shape[1:])

    def rows_of(self, padded: Tensor) -> Tensor:
        """(batch, length, …) → the real rows (n, …), with a way back."""
        x = padded.reshape(self.batch * self.length, *padded.shape[2:])
        return x if self.rows is None else pick(x, self.rows)

    def means(self, x: Tensor) -> Tensor:
        """Each example's mean row, (batch, h): one small product."""
        owner = torch.arange(self.batch, device=x.device).repeat_interleave(self.counts)
        share = x.new_zeros(self.batch, x.shape[0])
        share[owner, torch.arange(x.shape[0], device=x.device)] = 1.0 / self.counts.to(x.dtype)[owner]
        return share @ x
