"""Where the real tokens of a batch lie. Everything but attention runs on real tokens alone, one row each: padding costs nothing there.

Some rows of zeros stand at the end, so that the number of rows takes few values: kernels are made for every new shape.
"""

from functools import cached_property

import torch
from torch import Tensor

from .pieces import pick, spread


def rounded(rows: int) -> int:
    """The next of eight sizes in an octave, at least in steps of 8."""
    step = max(8, 1 << max(0, rows.bit_length() - 4))
    return -(-rows // step) * step


class Layout:
    """A batch of `counts` tokens each, padded to `length` for attention; `size` rows, of which the first `real` are tokens."""

    def __init__(self, mask: Tensor) -> None:
        self.mask = mask.bool()
        self.batch, self.length = mask.shape
        self.counts = self.mask.sum(1)
        self.real = int(self.counts.sum())
        full = self.real == self.mask.numel()
        self.size = self.real if full else rounded(self.real)
        self._hidden: dict[tuple[bool, int, int], Tensor | None] = {}
        self.rows = None if full else self.mask.flatten().nonzero().squeeze(1)

    @staticmethod
    def of(counts: Tensor) -> "Layout":
        """Right-padded examples of so many tokens."""
        length = int(counts.max())
        return Layout(torch.arange(length, device=counts.device).unsqueeze(0) < counts.unsqueeze(1))

    @cached_property
    def positions(self) -> Tensor:
        """Each row's position in its example, (size,)."""
        return self.take((self.mask.cumsum(1) - 1).flatten())

    def hidden(self, causal: bool, window: int, group: int) -> Tensor | None:
        """What is added to scores, broadcast over (batch, kv, group·length, length): -inf where a token must not look; None: it sees all.

        The same for all layers, so made once.
        """
        key = (causal, window, group)
        if key not in self._hidden:
            self._hidden[key] = self._hide(causal, window, group)
        return self._hidden[key]

    def _hide(self, causal: bool, window: int, group: int) -> Tensor | None:
        if not causal:
            if self.rows is None:
                return None
            return torch.zeros(self.mask.shape).masked_fill_(~self.mask, -torch.inf)[:, None, None, :]
        at = torch.arange(self.length)
        back = at.unsqueeze(1) - at.unsqueeze(0)
        unseen = (back < 0) | (back >= window) if window else back < 0
        return torch.zeros(back.shape).masked_fill_(unseen, -torch.inf).repeat(group, 1)

    def take(self, padded: Tensor) -> Tensor:
        """(batch·length, …) → rows (size, …)."""
        if self.rows is None:
            return padded
        return torch.cat([padded.index_select(0, self.rows), padded.new_zeros(self.size - self.real, *padded.shape[1:])])

    def join(self, rows: list[Tensor]) -> Tensor:
        """Examples' rows, one behind the other → (size, …)."""
        spare = self.size - self.real
        return torch.cat([*rows, rows[0].new_zeros(spare, *rows[0].shape[1:])] if spare else rows)

    def spread(self, x: Tensor) -> Tensor:
        """Rows (size, …) → (batch, length, …), zeros where there is no token."""
        if self.rows is not None:
            x = spread(x, self.rows, self.batch * self.length)
        return x.view(self.batch, self.length, *x.shape[1:])

    def rows_of(self, padded: Tensor) -> Tensor:
        """(batch, length, …) → rows (size, …), with a way back."""
        x = padded.reshape(self.batch * self.length, *padded.shape[2:])
        return x if self.rows is None else pick(x, self.rows, self.size)

    def means(self, x: Tensor) -> Tensor:
        """Each example's mean row, (batch, h): one small product."""
        owner = torch.arange(self.batch, device=x.device).repeat_interleave(self.counts)
        share = x.new_zeros(self.batch, x.shape[0])
        share[owner, torch.arange(self.real, device=x.device)] = 1.0 / self.counts.to(x.dtype)[owner]
        return share @ x
