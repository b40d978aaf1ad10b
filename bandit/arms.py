"""An arm: which modules a device adapts at which rank, how much it prunes, its bits, batch and steps.

A placement is written as a rule; cost model and aggregation only ever see what it expands to.

    top(2, r=8)                       the two layers nearest the output, rank 8 (FedSpine, LEGEND's depth)
    rising(3..5, total=48)            ranks rise towards the output, `total` over the layers (LEGEND)
    scored(query,value@5,3; r=4..16)  named modules in named layers, best first, rank halving from 16 to 4
"""

import re
from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from rankfleet.profiles.card import ModelCard, Module

_TOP = re.compile(r"top\(\s*(\d+)\s*,\s*r\s*=\s*(\d+)\s*\)\Z")
_RISING = re.compile(r"rising\(\s*(\d+)\s*\.\.\s*(\d+)\s*,\s*total\s*=\s*(\d+)\s*\)\Z")
_SCORED = re.compile(r"scored\(\s*([\w.,\s]+?)\s*@\s*([\d,\s]+?)\s*;\s*r\s*=\s*(\d+)\s*\.\.\s*(\d+)\s*\)\Z")


class Arm(msgspec.Struct, frozen=True, order=True, kw_only=True, forbid_unknown_fields=True):
    """One choice for one device and round."""

    placement: str
    prune: Annotated[float, Meta(ge=0, lt=1)] = 0.0
    bits: int = 32
    batch: Annotated[int, Meta(ge=1)] = 8
    steps: Annotated[int, Meta(ge=1)] = 8

    def text(self) -> str:
        """Short form for tables."""
        pruned = f" p{self.prune:g}" if self.prune else ""
        return f"{self.placement} {self.bits}b{pruned} x{self.steps}"


class ArmSpace(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a job lets the tuner choose from."""

    ranks: tuple[Annotated[int, Meta(ge=1, le=512)], ...] = (4, 8, 16)
    depths: tuple[Annotated[int, Meta(ge=1)], ...] = ()
    """Adapted layers, counted from the output; empty: 1 to `max_depth`."""
    placements: tuple[str, ...] = ()
    """Rules to choose from beside `top` of every depth and rank."""
    prune: tuple[Annotated[float, Meta(ge=0, le=0.9)], ...] = (0.0,)
    bits: tuple[int, ...] | Literal["auto"] = (32, 8, 4)
    """Each device gets the one that it measured fastest among those that fit; `auto`: of all four."""
    steps: tuple[Annotated[int, Meta(ge=1)], ...] = (8,)
    batch: Annotated[int, Meta(ge=1)] = 8
    masks: Literal["global", "private"] = "global"
    """One order of heads and channels for the fleet, or each device's own by its data, as FedSpine's
    devices prune."""

    @property
    def precisions(self) -> tuple[int, ...]:
        """Bits to choose from."""
        return (32, 16, 8, 4) if self.bits == "auto" else self.bits

    def rules(self, max_depth: int) -> list[str]:
        """Every placement rule of the space, at most `max_depth` layers deep."""
        depths = [d for d in (self.depths or range(1, max_depth + 1)) if d <= max_depth]
        return [f"top({d}, r={r})" for d in depths for r in self.ranks] + list(self.placements)

    def arms(self, max_depth: int) -> list[Arm]:
        """All arms, in a fixed order."""
        return [
            Arm(placement=p, prune=q, bits=b, batch=self.batch, steps=s)
            for p in self.rules(max_depth)
            for q in sorted(set(self.prune))
            for b in self.precisions
            for s in self.steps
        ]


def targets(card: ModelCard, wanted: list[str]) -> list[Module]:
    """Modules that a job adapts: `all`, `auto` (q and v on encoders, all on decoders) or endings of names."""
    if wanted == ["all"] or (wanted == ["auto"] and card.causal):
        return list(card.modules)
    ends = ["query", "value", "q_proj", "v_proj", "q_lin", "v_lin"] if wanted == ["auto"] else wanted
    found = [m for m in card.modules if any(m.name == e or m.name.endswith("." + e) for e in ends)]
    return found or (list(card.modules) if wanted == ["auto"] else [])


def expand(rule: str, card: ModelCard, modules: list[Module]) -> dict[str, int]:
    """Module → rank. Raises ValueError for a rule that is not understood or reaches outside the model."""
    if found := _TOP.match(rule):
        depth, rank = map(int, found.groups())
        return {m.name: _fit(m, rank) for m in modules if m.layer >= card.layers - depth}
    if found := _RISING.match(rule):
        first, last, total = map(int, found.groups())
        return _rising(first, last, total, card, modules)
    if found := _SCORED.match(rule):
        return _scored(found, card, modules)
    raise ValueError(
        f"placement `{rule}` is not understood; write top(2, r=8), rising(3..5, total=48) or "
        "scored(query,value@5,3; r=4..16)"
    )


def _fit(module: Module, rank: int) -> int:
    return max(1, min(rank, module.out, module.in_))


def _rising(first: int, last: int, total: int, card: ModelCard, modules: list[Module]) -> dict[str, int]:
    count = last - first + 1
    if count < 1 or last >= card.layers or total < count:
        raise ValueError(
            f"rising({first}..{last}, total={total}): the model has layers 0..{card.layers - 1}, and every "
            "layer needs at least rank 1"
        )
    # Arithmetic progression around the mean, with the step that keeps the lowest rank at or above half of it.
    mean = total / count
    step = mean / count if count > 1 else 0.0
    ranks = [max(1, round(mean + step * (i - (count - 1) / 2))) for i in range(count)]
    ranks[-1] = max(1, ranks[-1] + total - sum(ranks))
    return {m.name: _fit(m, ranks[m.layer - first]) for m in modules if first <= m.layer <= last}


def _scored(found: "re.Match[str]", card: ModelCard, modules: list[Module]) -> dict[str, int]:
    names = [n.strip() for n in found.group(1).split(",")]
    layers = [int(n) for n in found.group(2).split(",")]
    low, high = int(found.group(3)), int(found.group(4))
    if any(n >= card.layers for n in layers) or low > high or low < 1:
        raise ValueError(
            f"{found.group(0)}: the model has layers 0..{card.layers - 1}, and ranks rise from low to high"
        )
    rank = {layer: max(low, high >> i) for i, layer in enumerate(layers)}
    placed = {
        m.name: _fit(m, rank[m.layer])
        for m in modules
        if m.layer in rank and any(m.name.endswith("." + n) for n in names)
    }
    if not placed:
        raise ValueError(f"{found.group(0)} names no module that the job adapts")
    return placed


def rank_and_depth(placement: dict[str, int], card: ModelCard) -> tuple[int, int]:
    """(largest rank, layers from the lowest adapted one to the output): what tables show of a placement."""
    low = min((m.layer for m in card.modules if m.name in placement), default=card.layers)
    return max(placement.values(), default=0), card.layers - low
