"""UCB1 per device over all feasible arms (Auer, Cesa-Bianchi, Fischer, 2002): mean + √(2 ln t / n), unseen
arms first."""

import math
import random
from collections.abc import Sequence

from ..policy import Choice, Member, Outcome, Policy, State
from ..reward import rate


class UCB1(Policy, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Model-free; needs many rounds before it beats a good fixed arm."""

    def choose(
        self, members: Sequence[Member], state: State, round: int, rng: random.Random
    ) -> dict[str, Choice]:
        """Unseen arms in random order, then the highest upper bound."""
        chosen = {}
        for m in members:
            seen = state.get(m.device, {})
            total = sum(n for n, _ in seen.values())
            fresh = [a for a in m.arms if a.arm.text() not in seen]
            if fresh:
                pick = rng.choice(fresh)
                chosen[m.device] = Choice(pick.arm, f"not tried yet, {len(fresh)} arms are left to try")
                continue
            bounds = [
                (
                    seen[a.arm.text()][1] / seen[a.arm.text()][0]
                    + math.sqrt(2 * math.log(total) / seen[a.arm.text()][0]),
                    a,
                )
                for a in m.arms
            ]
            bound, pick = max(bounds, key=lambda b: (b[0], b[1].arm))
            chosen[m.device] = Choice(pick.arm, f"upper confidence bound {bound:.2f} after {total:.0f} pulls")
        return chosen

    def observe(self, outcomes: Sequence[Outcome], state: State) -> None:
        """Bounded reward: loss drop per second over the largest seen so far. An arm whose reward is
        unknown stays untried."""
        rates = {o.device: rate(o) for o in outcomes}
        top = max([state.get("top", {}).get("rate", [0, 0.0])[1], *rates.values(), 1e-12])
        state["top"] = {"rate": [0, top]}
        for o in (o for o in outcomes if not o.unknown):
            entry = state.setdefault(o.device, {}).setdefault(o.arm.text(), [0, 0.0])
            entry[0] += 1
            entry[1] += 0.0 if o.failed else rates[o.device] / top
