"""Adapted maps: W·x + s·B·A·x + C_B·C_A·x, for one map or for several that read the same input, as one step of autograd.

The base is frozen, so a map keeps its input only where its factors are trained, and nothing at all below the lowest adapter.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .frozen import Frozen


class Site:
    """A linear map of the model: frozen weight, an optional pair A (r, in), B (out, r), an optional frozen carry."""

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
            raise ValueError(f"{self.name}: factors {tuple(b.shape)}·{tuple(a.shape)} do not fit a map ({self.base.out}, {self.base.in_})")
        self.A, self.B, self.scale = a.clone().requires_grad_(trained), b.clone().requires_grad_(trained), scale

    def clear(self) -> None:
        """Take the pair out: the base alone."""
        self.A = self.B = None

    def pairs(self) -> list[tuple[Tensor, Tensor, float]]:
        """What is added to the base: (A, B, scale), the trainable one first."""
        found = [(self.A, self.B, self.scale)] if self.A is not None and self.B is not None else []
        return found + ([(self.carry[1], self.carry[0], 1.0)] if self.carry is not None else [])


def apply(x: Tensor, sites: Sequence[Site]) -> list[Tensor]:
    """Every site's output (n, out) for the input x (n, in) that they share."""
    pairs = [p for s in sites for p in s.pairs()]
    if not pairs:
        return list(_Alone.apply(x, sites)) if torch.is_grad_enabled() and x.requires_grad else [s.base.product(x) for s in sites]  # type: ignore[no-untyped-call]
    factors = [f for a, b, _ in pairs for f in (a, b)]
    if not torch.is_grad_enabled() or not (x.requires_grad or any(f.requires_grad for f in factors)):
        return _forward(x, sites, _stacked(pairs, x))
    return list(_Adapted.apply(x, sites, *factors))  # type: ignore[no-untyped-call]


def _stacked(pairs: list[tuple[Tensor, Tensor, float]], x: Tensor) -> Tensor | None:
    """All A below each other, in the dtype of x: one thin product instead of several."""
    if not pairs:
        return None
    return torch.cat([a.detach() for a, _, _ in pairs]).to(x.dtype) if len(pairs) > 1 else pairs[0][0].detach().to(x.dtype)


def _forward(x: Tensor, sites: Sequence[Site], stack: Tensor | None, thin: Tensor | None = None) -> list[Tensor]:
    found = []
    if stack is not None and thin is None:
        thin = x @ stack.t()
    at = 0
    for site in sites:
        y = site.base.product(x)
        for a, b, scale in site.pairs():
            assert thin is not None
            y.addmm_(thin[:, at : at + a.shape[0]], b.detach().to(x.dtype).t(), alpha=scale)
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
        stack = _stacked(pairs, x)
        thin = None if stack is None else x @ stack.t()
        ctx.sites, ctx.counts = sites, [len(s.pairs()) for s in sites]
        ctx.scales = [s for _, _, s in pairs]
        trained = any(ctx.needs_input_grad[2:])
        ctx.save_for_backward(x if trained else None, thin if trained else None, stack, *factors)
        return tuple(_forward(x, sites, stack, thin))

    @staticmethod
    @torch.autograd.function.once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        x, thin, stack, *factors = ctx.saved_tensors
        back: Tensor | None = None
        thins, found = [], []
        at = number = 0
        for site, g, count in zip(ctx.sites, grads, ctx.counts, strict=True):
            if g is not None and ctx.needs_input_grad[0]:
                back = site.base.back(g, back)
            for _ in range(count):
                b, scale = factors[2 * number + 1], ctx.scales[number]
                rank = b.shape[1]
                needs_b = ctx.needs_input_grad[2 + 2 * number + 1]
                if g is None:
                    thins.append(stack.new_zeros(0, rank) if x is None else x.new_zeros(x.shape[0], rank))
                    found += [None]
                else:
                    thins.append((g @ b.to(g.dtype)).mul_(scale))
                    found += [(g.t() @ thin[:, at : at + rank]).float().mul_(scale) if needs_b else None]
                at, number = at + rank, number + 1
        if not thins:
            return back, None
        joined = torch.cat(thins, dim=1) if len(thins) > 1 else thins[0]
        if back is not None:
            back = back.addmm_(joined, stack)
        wants = [ctx.needs_input_grad[2 + 2 * n] for n in range(number)]
        down = (joined.t() @ x).float() if any(wants) else None
        result: list[Tensor | None] = []
        at = 0
        for n in range(number):
            rank = factors[2 * n].shape[0]
            result += [down[at : at + rank] if down is not None and wants[n] else None, found[n]]
            at += rank
        return back, None, *result
