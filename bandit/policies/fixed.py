"""Fixed: one placement for all devices (or the nearest smaller one that fits), for baselines and
reproducible runs."""

import random
from collections.abc import Sequence

from ..policy import Choice, Member, Outcome, Policy, State


class Fixed(Policy, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`placement` where it is feasible, else the feasible arm with the highest utility; first steps, least
    pruning."""

    placement: str = ""

    def choose(
        self, members: Sequence[Member], state: State, round: int, rng: random.Random
    ) -> dict[str, Choice]:
        """The same every round."""
        chosen = {}
        for m in members:
            same = [a for a in m.arms if a.arm.placement == self.placement]
            pick = same[0] if same else max(m.arms, key=lambda a: (a.utility, a.arm))
            chosen[m.device] = Choice(pick.arm, "fixed by the job" if same else "the largest arm that fits")
        return chosen

    def observe(self, outcomes: Sequence[Outcome], state: State) -> None:
        """Nothing to learn."""
