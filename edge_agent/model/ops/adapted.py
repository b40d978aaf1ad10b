"""Adapted maps: W·x + s·B·A·x + C_B·C_A·x, for one map or for several that read the same input, as one
step of autograd.

The base is frozen, so a map keeps its input only where its factors are trained, and nothing at all below
the lowest adapter.
"""

from collections.abc import Sequence
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from .frozen import Frozen


class Site:
    """A linear map of the model: frozen weight, an optional pair A (r, in), B (out, r), an optional frozen
    carry."""

    def __init__(self, name: str, layer: int, base: Frozen) -> None:
        self.name, self.layer, self.base = name, layer, base
        self.A: Tensor | None = None
        self.B: Tensor | None = None
        self.scale = 1.0
        self.carry: tuple[Tensor, Tensor] | None = None
        """(C_B, C_A)."""

    def place(self, a: Tensor, b: Tensor, scale: float, trained: bool) -> None:
        """Put a pair in; `trained` decides whether autograd sees it."""
        if a.shape[1] != self.base.in_ or b.shape[0] != self.base.out:
            raise ValueError(
                f"{self.name}: factors {tuple(b.shape)}·{tuple(a.shape)} do not fit a map ({self.base.out}, "
                f"{self.base.in_})"
            )
        self.A, self.B, self.scale = (
            a.clone().requires_grad_(trained),
            b.clone().requires_grad_(trained),
            scale,
        )

    def clear(self) -> None:
        """Take pair and carry out: the base alone."""
        self.A = self.B = self.carry = None

    def pairs(self) -> list[tuple[Tensor, Tensor, float]]:
        """What is added to the base: (A, B, scale), the trainable one first."""
        found = [(self.A, self.B, self.scale)] if self.A is not None and self.B is not None else []
        return found + ([(self.carry[1], self.carry[0], 1.0)] if self.carry is not None else [])


def apply(x: Tensor, sites: Sequence[Site]) -> list[Tensor]:
    """Every site's output (n, out) for the input x (n, in) that they share."""
    pairs = [p for s in sites for p in s.pairs()]
    factors = [f for a, b, _ in pairs for f in (a, b)]
    recorded = torch.is_grad_enabled() and (x.requires_grad or any(f.requires_grad for f in factors))
    if not pairs:
        return list(_Alone.apply(x, sites)) if recorded else [s.base.product(x) for s in sites]  # type: ignore[no-untyped-call]
    if not recorded:
        fine = _fine(x)
        return _forward(sites, x, fine @ _stacked(pairs, fine).t())
    return list(_Adapted.apply(x, sites, *factors))  # type: ignore[no-untyped-call]


def _fine(x: Tensor) -> Tensor:
    """What thin products are computed with: fp32 on a CPU. BLAS has a kernel for all shapes, oneDNN makes
    a 16-bit one for each, slowly."""
    return x.float() if x.device.type == "cpu" else x


def _stacked(pairs: list[tuple[Tensor, Tensor, float]], x: Tensor) -> Tensor:
    """All A below each other, in the dtype of x: one thin product instead of several."""
    return (
        torch.cat([a.detach() for a, _, _ in pairs]).to(x.dtype)
        if len(pairs) > 1
        else pairs[0][0].detach().to(x.dtype)
    )


def _plus(y: Tensor, thin: Tensor, b: Tensor, scale: float) -> None:
    """y += scale·thin·Bᵀ, in place."""
    if y.dtype == thin.dtype:
        y.addmm_(thin, b.t(), alpha=scale)
    else:
        y.add_(thin @ b.t(), alpha=scale)


def _forward(sites: Sequence[Site], x: Tensor, thin: Tensor) -> list[Tensor]:
    found, at = [], 0
    for site in sites:
        y = site.base.product(x)
        for a, b, scale in site.pairs():
            _plus(y, thin[:, at : at + a.shape[0]], b.detach().to(thin.dtype), scale)
            at += a.shape[0]
        found.append(y)
    return found


class _Alone(torch.autograd.Function):
    """Several maps of one input without adapters. Nothing is kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, sites: Sequence[Site]) -> tuple[Tensor, ...]:
        ctx.bases = [s.base for s in sites]
        return tuple(base.product(x) for base in ctx.bases)

    @staticmethod
    @torch.autograd.function.once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        back: Tensor | None = None
        for base, g in zip(ctx.bases, grads, strict=True):
            if g is not None:
                back = base.back(g, back)
        return back, None


class _Adapted(torch.autograd.Function):
    """Several maps of one input. Kept for the way back: x and the thin product, if any factor is trained."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, sites: Sequence[Site], *factors: Tensor) -> tuple[Tensor, ...]:
        pairs = [p for s in sites for p in s.pairs()]
        fine = _fine(x)
        stack = _stacked(pairs, fine)
        thin = fine @ stack.t()
        ctx.sites, ctx.counts = sites, [len(s.pairs()) for s in sites]
        ctx.scales, ctx.rows = [s for _, _, s in pairs], len(x)
        trained = any(ctx.needs_input_grad[2:])
        ctx.save_for_backward(x if trained else None, thin if trained else None, stack, *factors)
        return tuple(_forward(sites, x, thin))

    @staticmethod
    @torch.autograd.function.once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        x, thin, stack, *factors = ctx.saved_tensors
        needs, back = ctx.needs_input_grad, None
        thins: list[Tensor] = []
        up: list[Tensor | None] = []
        ups, at = iter(zip(factors[1::2], ctx.scales, strict=True)), 0
        for site, g, count in zip(ctx.sites, grads, ctx.counts, strict=True):
            if g is not None and needs[0]:
                back = site.base.back(g, back)
            fine = _fine(g) if g is not None and count else None
            for b, scale in islice(ups, count):
                rank = b.shape[1]
                wanted = needs[3 + 2 * len(up)]
                if fine is None:
                    up.append(None)
                    thins.append(stack.new_zeros(ctx.rows, rank))
                else:
                    up.append((fine.t() @ thin[:, at : at + rank]).float().mul_(scale) if wanted else None)
                    thins.append((fine @ b.to(fine.dtype)).mul_(scale))
                at += rank
        joined = torch.cat(thins, dim=1) if len(thins) > 1 else thins[0]
        if back is not None:
            _plus(back, joined, stack.t(), 1.0)
        ranks = [a.shape[0] for a in factors[::2]]
        down = (
            torch.split((joined.t() @ _fine(x)).float(), ranks) if any(needs[2::2]) else [None] * len(ranks)
        )
        pairs = zip(down, up, needs[2::2], strict=True)
        result = [t for for_a, for_b, wanted in pairs for t in (for_a if wanted else None, for_b)]
        return back, None, *result
