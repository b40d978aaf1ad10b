"""Default: feasible candidates by cost model, a common deadline by sweep, and a small UCB among the best
(docs/specification.md).

The re-estimated time model does the work; the bandit adds what no model knows. Candidates are the top arms
that fit the deadline; infeasible ones are dropped, never used as padding. Learning is per kind of device:
five to ten times more data.
"""

import math
import random
from collections.abc import Sequence
from typing import Annotated

from msgspec import Meta

from ..policy import Choice, Member, Outcome, Policy, Priced, State
from ..reward import rate


class CostUCB(Policy, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Deadline sweep, then UCB with the prior as two pseudo-observations."""

    width: Annotated[float, Meta(ge=0, description="confidence width c")] = 0.04
    candidates: Annotated[int, Meta(ge=1, description="arms that compete at the deadline")] = 6
    discount: Annotated[float, Meta(gt=0, le=1, description="forgetting per round")] = 0.98
    explorers: Annotated[
        float, Meta(ge=0, le=1, description="share of devices that may explore in a round")
    ] = 0.5

    def choose(
        self, members: Sequence[Member], state: State, round: int, rng: random.Random
    ) -> dict[str, Choice]:
        """The deadline that buys most utility per second; within it, the arm with the highest index."""
        deadline = sweep(members)
        explorers = {m.device for m in members if rng.random() < self.explorers}
        chosen: dict[str, Choice] = {}
        for member in members:
            fits = [a for a in member.arms if a.seconds <= deadline] or [
                min(member.arms, key=lambda a: a.seconds)
            ]
            fits = sorted(fits, key=lambda a: (-a.utility, a.seconds, a.arm))[: self.candidates]
            best = fits[0]
            if member.device in explorers:
                best = max(fits, key=lambda a: (self._index(a, fits, member.kind, state, round), a.utility))
            tried = state.get(key(member.kind, best), [0.0, 0.0])[0]
            why = (
                f"fits {member.kind} in {best.memory_mb:.0f} MB and the fleet's {deadline:.1f} s "
                f"({best.seconds:.1f} s expected)"
                + (
                    f", best of {len(fits)} by index after {tried:.0f} trials"
                    if member.device in explorers
                    else ", highest expected gain"
                )
            )
            chosen[member.device] = Choice(best.arm, why)
        return chosen

    def _index(self, arm: Priced, rivals: list[Priced], kind: str, state: State, round: int) -> float:
        n, total = state.get(key(kind, arm), [0.0, 0.0])
        prior = arm.utility / (max(a.utility for a in rivals) or 1.0)
        return float((total + 2 * prior) / (n + 2)) + self.width * math.sqrt(
            2 * math.log(round + 2) / (n + 2)
        )

    def observe(self, outcomes: Sequence[Outcome], state: State) -> None:
        """Reward: loss drop per second, relative to the best of the round, bounded to [0, 1]. What is
        unknown counts as no trial."""
        for value in state.values():
            value[0] *= self.discount
            value[1] *= self.discount
        rates = {o.device: rate(o) for o in outcomes if not o.failed}
        top = max(rates.values(), default=0.0)
        for o in (o for o in outcomes if not o.unknown):
            entry = state.setdefault(f"{o.kind}|{o.arm.placement}|{o.arm.prune:g}|{o.arm.steps}", [0.0, 0.0])
            entry[0] += 1.0
            entry[1] += rates[o.device] / top if o.device in rates and top > 0 else 0.0


def key(kind: str, arm: Priced) -> str:
    """Where the statistics of an arm lie."""
    return f"{kind}|{arm.arm.placement}|{arm.arm.prune:g}|{arm.arm.steps}"


def sweep(members: Sequence[Member]) -> float:
    """The deadline D with the most utility per second: mean share·g(best arm within D) / slowest chosen
    arm."""
    times = sorted({round(a.seconds, 3) for m in members for a in m.arms})
    times = times[:: max(1, len(times) // 64)] + times[-1:]
    best, best_score = times[-1], -1.0
    for deadline in times:
        picks = []
        for m in members:
            fits = [a for a in m.arms if a.seconds <= deadline]
            picks.append(
                (
                    m.share,
                    max(fits, key=lambda a: a.utility) if fits else min(m.arms, key=lambda a: a.seconds),
                )
            )
        score = sum(s * a.utility for s, a in picks) / max(a.seconds for _, a in picks)
        if score > best_score:
            best, best_score = max(a.seconds for _, a in picks), score
    return best
