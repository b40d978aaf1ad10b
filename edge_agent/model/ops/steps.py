"""Steps between the maps that keep less for the way back than torch's own: RMS norm, gated activation,
rotary positions, padding."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import gelu, silu


class _RMSNorm(torch.autograd.Function):
    """x / rms(x) · w with a frozen w; keeps x and one number a row."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        length = torch.linalg.vector_norm(
            x, dim=-1, keepdim=True
        )  # one pass and no copy, unlike the mean of a square
        scale: Tensor = length.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, scale)
        return (x * scale).mul_(weight)

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, scale = ctx.saved_tensors
        g = g * weight
        size = x.shape[-1]
        along = (
            torch.bmm(g.reshape(-1, 1, size), x.reshape(-1, size, 1))
            .view_as(scale)
            .mul_(scale.pow(3))
            .div_(size)
        )
        return g.mul_(scale).addcmul_(x, along, value=-1), None, None


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x (…, h) over the root of its mean square, times the frozen `weight`."""
    result: Tensor = _RMSNorm.apply(x, weight, eps)  # type: ignore[no-untyped-call]
    return result


class _Gated(torch.autograd.Function):
    """act(gate)·up; keeps the two inputs alone."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, name: str) -> Tensor:
        ctx.name = name
        ctx.save_for_backward(gate, up)
        return activate(gate, name).mul_(up)

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        gate, up = ctx.saved_tensors
        for_gate = slope(g * up, gate, ctx.name)
        return for_gate, activate(gate, ctx.name).mul_(g), None


def gated(gate: Tensor, up: Tensor, name: str) -> Tensor:
    """act(gate)·up."""
    result: Tensor = _Gated.apply(gate, up, name)  # type: ignore[no-untyped-call]
    return result


def activate(x: Tensor, name: str) -> Tensor:
    """An activation by its name in `config.json`."""
    if name == "silu":
        return silu(x)
    if name == "relu":
        return x.clamp_min(0)
    return gelu(x, approximate="none" if name == "gelu" else "tanh")


def activated(x: Tensor, name: str) -> Tensor:
    """An activation, in place where nothing needs x for the way back."""
    if torch.is_grad_enabled() and x.requires_grad:
        return activate(x, name)
    if name == "silu":
        return silu(x, inplace=True)
    if name == "relu":
        return x.clamp_min_(0)
    found: Tensor = torch.ops.aten.gelu_(x, approximate="none" if name == "gelu" else "tanh")
    return found


def slope(g: Tensor, x: Tensor, name: str) -> Tensor:
    """g times the activation's derivative at x."""
    if name == "relu":
        return g * (x > 0)
    found: Tensor
    if name == "silu":
        found = torch.ops.aten.silu_backward(g, x)
    else:
        found = torch.ops.aten.gelu_backward(g, x, approximate="none" if name == "gelu" else "tanh")
    return found


class _Rotate(torch.autograd.Function):
    """Rotary positions: the two halves of each head's first `cos.shape[-1]·2` channels turn; the way back
    turns them back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return turned(x, cos, sin)

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        cos, sin = ctx.saved_tensors
        return turned(g, cos, -sin), None, None


def turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x (n, heads, size) by the angles (n, 1, half)."""
    half = cos.shape[-1]
    a, b = x[..., :half], x[..., half : 2 * half]
    y = torch.empty_like(x)
    torch.mul(a, cos, out=y[..., :half]).addcmul_(b, sin, value=-1)
    torch.mul(b, cos, out=y[..., half : 2 * half]).addcmul_(a, sin)
    if x.shape[-1] > 2 * half:
        y[..., 2 * half :] = x[..., 2 * half :]
    return y


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x (n, heads, size) turned by its rows' positions."""
    result: Tensor = _Rotate.apply(x, cos, sin)  # type: ignore[no-untyped-call]
    return result


class _Spread(torch.autograd.Function):
    """Rows to their places in a padded block; the way back picks them. Spare rows at the end stay out."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, rows: Tensor, total: int) -> Tensor:
        ctx.save_for_backward(rows)
        ctx.size = x.shape[0]
        return x.new_zeros(total, *x.shape[1:]).index_copy_(0, rows, x[: len(rows)])

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        (rows,) = ctx.saved_tensors
        return _with_spare(g, rows, ctx.size), None, None


class _Pick(torch.autograd.Function):
    """Rows out of a padded block; the way back puts them there."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, rows: Tensor, size: int) -> Tensor:
        ctx.save_for_backward(rows)
        ctx.total = x.shape[0]
        return _with_spare(x, rows, size)

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        (rows,) = ctx.saved_tensors
        return g.new_zeros(ctx.total, *g.shape[1:]).index_copy_(0, rows, g[: len(rows)]), None, None


def spread(x: Tensor, rows: Tensor, total: int) -> Tensor:
    """The first rows of x (size, …) at `rows` of a block of zeros (total, …)."""
    result: Tensor = _Spread.apply(x, rows, total)  # type: ignore[no-untyped-call]
    return result


def _with_spare(x: Tensor, rows: Tensor, size: int) -> Tensor:
    y = x.new_empty(size, *x.shape[1:])
    torch.index_select(x, 0, rows, out=y[: len(rows)])
    y[len(rows) :] = 0
    return y


def pick(x: Tensor, rows: Tensor, size: int) -> Tensor:
    """`rows` of x, and zeros behind them up to (size, …)."""
    result: Tensor = _Pick.apply(x, rows, size)  # type: ignore[no-untyped-call]
    return result
