"""FedSpine-style extended UCB: per device, boxes of (pruning ratio, log₂ rank) that split where rewards
come in.

Yao et al., arXiv 2501.02438, name a smoothed UCB over a progressively refined space, rewarded by loss
improvement, pruning progress, importance of the update and time relative to the others. The formulas are
not public to us: leaves, discount, split rule and reward below are the reconstruction of
docs/specification.md, not the paper's own. Depth and steps are the largest that fit.
"""

import math
import random
from collections.abc import Sequence
from statistics import median
from typing import Annotated, Any

from msgspec import Meta

from ..policy import Choice, Member, Outcome, Policy, Priced, State

Leaf = dict[str, Any]


class FedSpine(Policy, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """E-UCB lifted to a box."""

    width: Annotated[float, Meta(ge=0, description="confidence width c")] = 0.5
    discount: Annotated[float, Meta(gt=0, le=1, description="forgetting λ")] = 0.95
    split: Annotated[float, Meta(gt=0, le=1, description="longest side of a leaf before it splits, θ")] = 0.3

    def choose(
        self, members: Sequence[Member], state: State, round: int, rng: random.Random
    ) -> dict[str, Choice]:
        """The leaf with the highest index; a point drawn in it; the feasible arm nearest to the point."""
        return {
            m.device: self._one(m, state.setdefault(m.device, {"leaves": [_leaf(0.0, 1.0, 0.0, 1.0)]}), rng)
            for m in members
        }

    def _one(self, m: Member, own: State, rng: random.Random) -> Choice:
        leaves: list[Leaf] = own["leaves"]
        n = sum(q["n"] for q in leaves)
        scores = [
            math.inf
            if q["n"] < 1e-9
            else q["r"] / q["n"] + self.width * math.sqrt(2 * math.log(max(n, math.e)) / q["n"])
            for q in leaves
        ]
        at = max(range(len(leaves)), key=lambda i: (scores[i], -i))
        q = leaves[at]
        point = (rng.uniform(q["p0"], q["p1"]), rng.uniform(q["k0"], q["k1"]))
        pick = min(m.arms, key=lambda a: (_distance(a, m.arms, point), -a.depth, -a.arm.steps, a.arm))
        own["chosen"] = at
        own["last_prune"] = m.current.prune if m.current else 0.0
        return Choice(pick.arm, f"leaf {at + 1} of {len(leaves)} with index {scores[at]:.2f}")

    def observe(self, outcomes: Sequence[Outcome], state: State) -> None:
        """Reward w, discounted statistics, and a split of the chosen leaf."""
        times = [o.seconds for o in outcomes if not o.failed]
        middle = median(times) if times else 1.0
        for o in outcomes:
            own = state.get(o.device)
            if own is None or "chosen" not in own:
                continue
            for q in own["leaves"]:
                q["n"] *= self.discount
                q["r"] *= self.discount
            if o.unknown:
                del own["chosen"]
                continue
            drop = math.nan if o.drop is None else o.drop
            gain = drop / (abs(drop) + 0.1) if math.isfinite(drop) and not o.failed else 0.0
            progress = 1 + max(0.0, o.arm.prune - own["last_prune"])
            reward = gain * progress * (1 + o.norm_share) / (1 + abs(o.seconds - middle) / max(middle, 1e-6))
            q = own["leaves"][own.pop("chosen")]
            q["n"] += 1
            q["r"] += reward
            self._refine(own["leaves"], q)

    def _refine(self, leaves: list[Leaf], q: Leaf) -> None:
        wide, high = q["p1"] - q["p0"], q["k1"] - q["k0"]
        if max(wide, high) <= self.split:
            return
        leaves.remove(q)
        for half in (0, 1):
            child = dict(q, n=q["n"] / 2, r=q["r"] / 2)
            low, top = ("p0", "p1") if wide >= high else ("k0", "k1")
            middle = (q[low] + q[top]) / 2
            child[low], child[top] = (q[low], middle) if half == 0 else (middle, q[top])
            leaves.append(child)


def _leaf(p0: float, p1: float, k0: float, k1: float) -> Leaf:
    return {"p0": p0, "p1": p1, "k0": k0, "k1": k1, "n": 0.0, "r": 0.0}


def _distance(a: Priced, arms: Sequence[Priced], point: tuple[float, float]) -> float:
    """Squared distance in the unit box: pruning ratio and log₂ rank, each over its feasible range."""
    prunes = [x.arm.prune for x in arms]
    ranks = [math.log2(x.rank) for x in arms]

    def unit(value: float, values: list[float]) -> float:
        return (value - min(values)) / (max(values) - min(values)) if max(values) > min(values) else 0.0

    return round(
        (unit(a.arm.prune, prunes) - point[0]) ** 2 + (unit(math.log2(a.rank), ranks) - point[1]) ** 2, 9
    )
