"""Cross-entropy over a vocabulary without ever holding all logits: rows in chunks, the table in chunks
where it is not fp32.

The gradient of the hidden rows is made while the logits are there, for a weight of one each, and scaled on
the way back.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

LOGITS = 16 << 20
"""Logits held at once: 64 MB in fp32."""
TABLE = 4 << 20
"""Numbers of a 16-bit table that are widened at once."""


class _Losses(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, table: Tensor, bias: Tensor | None, targets: Tensor
    ) -> tuple[Tensor, Tensor]:
        losses, right = (
            x.new_empty(x.shape[0], dtype=torch.float32),
            targets.new_empty(targets.shape, dtype=torch.bool),
        )
        back = torch.empty_like(x) if ctx.needs_input_grad[0] else None
        rows = max(1, LOGITS // table.shape[0])
        for at in range(0, x.shape[0], rows):
            piece = slice(at, at + rows)
            losses[piece], right[piece] = _chunk(
                x[piece], table, bias, targets[piece], None if back is None else back[piece]
            )
        ctx.save_for_backward(back)
        ctx.mark_non_differentiable(right)
        return losses, right

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, g: Tensor, _: Any) -> tuple[Tensor | None, ...]:
        (back,) = ctx.saved_tensors
        return back * g.unsqueeze(1).to(back.dtype), None, None, None


def _pieces(table: Tensor, dtype: torch.dtype) -> Any:
    """(where, rows of the table in `dtype`)."""
    step = table.shape[0] if table.dtype == dtype else max(1, TABLE // table.shape[1])
    for at in range(0, table.shape[0], step):
        yield slice(at, at + step), table[at : at + step].to(dtype)


def _logits(x: Tensor, table: Tensor, bias: Tensor | None) -> Tensor:
    """fp32 (m, vocabulary)."""
    logits = torch.empty(x.shape[0], table.shape[0], dtype=torch.float32, device=x.device)
    for where, part in _pieces(table, x.dtype):
        if x.dtype == torch.float32:
            torch.mm(x, part.t(), out=logits[:, where])
        else:
            logits[:, where] = x @ part.t()
    return logits if bias is None else logits.add_(bias)


def _chunk(
    x: Tensor, table: Tensor, bias: Tensor | None, targets: Tensor, back: Tensor | None
) -> tuple[Tensor, Tensor]:
    logits = _logits(x, table, bias)
    wanted = logits.gather(1, targets.unsqueeze(1)).squeeze(1)
    top, guess = logits.max(dim=1)
    logits.sub_(top.unsqueeze(1)).exp_()
    total = logits.sum(dim=1)
    if back is not None:
        logits.div_(total.unsqueeze(1))
        logits[torch.arange(len(targets), device=x.device), targets] -= 1.0
        back.zero_()
        for where, part in _pieces(table, x.dtype):
            back.addmm_(logits[:, where].to(x.dtype), part)
    return total.log() + top - wanted, guess == targets


def guesses(x: Tensor, table: Tensor, bias: Tensor | None) -> Tensor:
    """The likeliest token after each row of x (m, h), (m,)."""
    return _logits(x, table, bias).argmax(dim=1)


def losses(x: Tensor, table: Tensor, bias: Tensor | None, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Cross-entropy of rows x (m, h) against `targets` (m,), and whether each would be guessed; the table
    (vocabulary, h) is frozen."""
    found: tuple[Tensor, Tensor] = _Losses.apply(x, table, bias, targets)  # type: ignore[no-untyped-call]
    return found
