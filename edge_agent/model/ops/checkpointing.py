"""Gradient checkpointing: a layer keeps its input alone, and is computed again on the way back.

torch.utils.checkpoint does this too, but imports torch's compiler and SymPy for it; nothing here is
random, so nothing has to be replayed.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


class _Again(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, layer: Callable[[Tensor], Tensor], x: Tensor, *factors: Tensor) -> Tensor:
        ctx.layer = layer
        ctx.save_for_backward(x, *factors)
        return layer(x)

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, *factors = ctx.saved_tensors
        x = x.detach().requires_grad_(ctx.needs_input_grad[1])
        wanted = ([x] if x.requires_grad else []) + factors
        with torch.enable_grad():
            # As the gradient of a number: autograd with a given gradient imports SymPy.
            found = torch.autograd.grad((ctx.layer(x) * g).sum(), wanted)
        return None, *([] if x.requires_grad else [None]), *found


def again(layer: Callable[[Tensor], Tensor], x: Tensor, factors: Sequence[Tensor]) -> Tensor:
    """layer(x), where `factors` are all trained tensors that it uses."""
    result: Tensor = _Again.apply(layer, x, *factors)  # type: ignore[no-untyped-call]
    return result
