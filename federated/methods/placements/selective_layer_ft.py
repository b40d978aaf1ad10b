"""Selective layers: a device trains the layers whose gradients are large, and not too different ones from
the others' (Sun et al., 2024).

max Σ_k Σ_l m_kl·g_kl - λ Σ_{i<j} Σ_l (m_il - m_jl)², at most `layers` for each device k (their P1), with
g_kl the squared norm of layer l's gradient on one batch, over the largest of all. Every `every` rounds
devices train all that their arm holds, and tell g. Reconstructed: they solve an integer programme, here
one device after the other is chosen for until nothing changes; a device trains one layer at least. Layers
that it does not train arrive frozen, as old as the job's `frozen_every` allows.
"""

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
from msgspec import Meta

from ...contract.contexts import Ask, ServerContext, StepContext, Torch
from ...contract.method import Method
from ...contract.spec import module_of
from ...contract.tensors import Array, Tensors


class SelectiveLayerFt(Method, frozen=True):
    """`arrived` tells gradients, `step` chooses, `plan` places."""

    tells: ClassVar[Literal["", "public", "private"]] = "private"
    evidence: ClassVar[str] = "toy-checked"
    use_when: ClassVar[str] = "devices can train few layers, and their data differ"
    example: ClassVar[dict[str, Any]] = {"every": 2}

    layers: Annotated[int, Meta(ge=1, description="layers that a device trains at most")] = 1
    agree: Annotated[
        float, Meta(ge=0, description="λ, how much devices are kept together; gradients are at most 1")
    ] = 0.0
    every: Annotated[int, Meta(ge=1, description="rounds between two looks at all layers")] = 5

    def plan(self, ask: Ask, device: str, ctx: ServerContext) -> Ask:
        """The device's own layers; all in a round of looking, and where it holds none of its own any more."""
        if device not in ctx.state.get("chosen", {}) or ctx.round.number % self.every == 0:
            return ask
        chosen = set(ctx.state["chosen"][device].tolist())
        own = {m: r for m, r in ask["placement"].items() if ctx.maps[m].layer in chosen}
        return {**ask, "placement": own or ask["placement"]}

    def arrived(self, params: Mapping[str, Torch], ctx: StepContext) -> Tensors:
        """‖g‖² of every map that is trained here, on the round's first batch."""
        if ctx.round.number % self.every:
            return {}
        factors = {k: p for k, p in params.items() if k.endswith((".A", ".B"))}
        _, grads = ctx.gradient(factors, next(ctx.batches()))
        squares: dict[str, float] = {}
        for name, grad in grads.items():
            squares[module_of(name)] = squares.get(module_of(name), 0.0) + float(grad.square().sum())
        return {module: np.array([square], np.float32) for module, square in squares.items()}

    def step(self, change: Mapping[str, Any], ctx: ServerContext) -> Mapping[str, Any]:
        """Choose anew for everybody when gradients were told; the aggregate as it is."""
        layers = sorted({m.layer for m in ctx.maps.values()})
        norms = ctx.state.setdefault("norms", {})
        for update in ctx.updates:
            told = {
                m: float(t[0]) for m, t in update.extra_of(self).items() if m in ctx.maps and t.shape == (1,)
            }
            if told:
                norms[update.device] = by_layer(
                    told, {m: layers.index(ctx.maps[m].layer) for m in told}, len(layers)
                )
        names = sorted(norms)
        if names and any(update.extra_of(self) for update in ctx.updates):
            gains = np.array([norms[name] for name in names])
            picked = choose(gains / max(float(gains.max()), 1e-30), self.layers, self.agree)
            ctx.state["chosen"] = {
                n: np.array(layers, np.int32)[row] for n, row in zip(names, picked, strict=True)
            }
        return change


def by_layer(squares: Mapping[str, float], places: Mapping[str, int], count: int) -> Array:
    """(count,) sums over a layer's maps; -inf for layers that the device does not hold."""
    sums = np.full(count, -np.inf)
    for module, square in squares.items():
        at = places[module]
        sums[at] = max(0.0, sums[at]) + max(0.0, square)
    return sums


def choose(gains: Array, budget: int, agree: float) -> Array:
    """m, True where a device trains a layer, of `gains` (devices, layers), at most 50 times round."""
    count, width = gains.shape
    m = np.zeros((count, width), bool)
    for _ in range(50):
        before = m.copy()
        for k in range(count):
            # What a layer adds: its gain, less λ for everybody who leaves it out, and more for everybody who
            # does not.
            score = gains[k] - agree * ((count - 1) - 2 * (m.sum(0) - m[k]))
            best = np.argsort(-score, kind="stable")[: min(budget, width)]
            m[k] = False
            m[k, [j for j in best if score[j] > 0] or best[:1]] = True
        if (m == before).all():
            break
    return m
