"""Where the real tokens of a batch lie. Everything but attention runs on real tokens alone, one row each:
padding costs nothing there.

Some spare rows stand at the end, so that the number of rows takes few values: kernels are made for every
new shape. They begin as zeros, hold what biases make of them, and get no gradient: whoever sums over rows
takes the first `real`.
"""

from functools import cached_property

import torch
from torch import Tensor

from .steps import pick, spread


def rounded(rows: int) -> int:
    """The next of eight sizes in an octave, at least in steps of 8."""
    step = max(8, 1 << max(0, rows.bit_length() - 4))
    return -(-rows // step) * step


class Layout:
    """A batch of `counts` tokens each, padded to `length` for attention; `size` rows, of which the first
    `real` are tokens.

    `mask` and `counts` stay on the CPU, so that no size has to be fetched from `device`, where the rows are.
    """

    def __init__(self, mask: Tensor, device: torch.device | str = "cpu") -> None:
        self.mask, self.device = mask.cpu().bool(), torch.device(device)
        self.batch, self.length = mask.shape
        self.counts = self.mask.sum(1)
        self.real = int(self.counts.sum())
        full = self.real == self.mask.numel()
        self.size = self.real if full else rounded(self.real + 1)
        self._hidden: dict[tuple[bool, int, int], Tensor | None] = {}
        self._heads: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}
        self._places = None if full else self.mask.flatten().nonzero().squeeze(1)

    @staticmethod
    def of(counts: Tensor, device: torch.device | str = "cpu") -> "Layout":
        """Right-padded examples of so many tokens."""
        return Layout(torch.arange(int(counts.max())).unsqueeze(0) < counts.unsqueeze(1), device)

    @cached_property
    def rows(self) -> Tensor | None:
        """Where the real tokens stand in the padded block; None where it has no padding."""
        return None if self._places is None else self._places.to(self.device)

    @cached_property
    def seen(self) -> Tensor | None:
        """The mask for fused attention, (batch, 1, 1, length); None where nothing is hidden."""
        return None if self._places is None else self.mask[:, None, None, :].to(self.device)

    @cached_property
    def positions(self) -> Tensor:
        """Each row's position in its example, (size,)."""
        return self.take((self.mask.cumsum(1) - 1).flatten())

    def hidden(self, causal: bool, window: int, group: int) -> Tensor | None:
        """What is added to scores, broadcast over (batch, kv, keys, group·queries): -inf where a token
        must not look; None: it sees all.

        The same for all layers, so made once.
        """
        key = (causal, window, group)
        if key not in self._hidden:
            made = self._hide(causal, window, group)
            self._hidden[key] = None if made is None else made.to(self.device)
        return self._hidden[key]

    def _hide(self, causal: bool, window: int, group: int) -> Tensor | None:
        if not causal:
            if self._places is None:
                return None
            return torch.zeros(self.mask.shape).masked_fill_(~self.mask, -torch.inf)[:, None, :, None]
        at = torch.arange(self.length)
        back = at.unsqueeze(0) - at.unsqueeze(1)
        unseen = (back < 0) | (back >= window) if window else back < 0
        return torch.zeros(back.shape).masked_fill_(unseen, -torch.inf).repeat(1, group)

    def heads(self, x: Tensor, kv: int, group: int) -> Tensor:
        """Rows (size, kv·group, d) → (batch·kv, group·length, d) in one pass; where there is no token, the
        last row, a spare one."""
        there, _ = self._head_places(kv, group)
        return (
            x.reshape(-1, x.shape[-1]).index_select(0, there).view(self.batch * kv, group * self.length, -1)
        )

    def rows_of_heads(self, x: Tensor, kv: int, group: int) -> Tensor:
        """Back to rows (size, kv·group, d); spare rows get what stands where the first padding is."""
        _, back = self._head_places(kv, group)
        return x.view(-1, x.shape[-1]).index_select(0, back).view(self.size, kv * group, -1)

    def _head_places(self, kv: int, group: int) -> tuple[Tensor, Tensor]:
        """Where each head of each place in the padded block stands among the rows, and the way back; the
        same for all layers."""
        if (kv, group) not in self._heads:
            row = torch.full((self.batch * self.length,), self.size - 1)
            row[self.mask.flatten()] = torch.arange(self.real)
            there = row.view(self.batch, 1, 1, self.length) * (kv * group) + torch.arange(kv * group).view(
                1, kv, group, 1
            )
            place = (
                torch.arange(there.numel())
                .view(self.batch, kv, group, self.length)
                .permute(0, 3, 1, 2)
                .reshape(-1, kv * group)
            )
            if self._places is not None:
                first = int((~self.mask.flatten()).nonzero()[0])
                place = torch.cat(
                    [place.index_select(0, self._places), place[first].expand(self.size - self.real, -1)]
                )
            self._heads[kv, group] = there.flatten().to(self.device), place.flatten().to(self.device)
        return self._heads[kv, group]

    def take(self, padded: Tensor) -> Tensor:
        """(batch·length, …), on the CPU → rows (size, …) on the device."""
        if self._places is not None:
            spare = padded.new_zeros(self.size - self.real, *padded.shape[1:])
            padded = torch.cat([padded.index_select(0, self._places), spare])
        return padded.to(self.device)

    def join(self, rows: list[Tensor]) -> Tensor:
        """Examples' rows, one behind the other → (size, …)."""
        spare = self.size - self.real
        return torch.cat([*rows, rows[0].new_zeros(spare, *rows[0].shape[1:])] if spare else rows).to(
            self.device
        )

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
        owner = torch.arange(self.batch).repeat_interleave(self.counts)
        share = torch.zeros(self.batch, x.shape[0], dtype=x.dtype)
        share[owner, torch.arange(self.real)] = 1.0 / self.counts.to(x.dtype)[owner]
        return share.to(self.device) @ x
