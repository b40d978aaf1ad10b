"""Updates far longer than usual are put aside, whatever the job's own defences do: a broken or hostile
device must not steer a round.

The norm of an update in product space grows with its local steps; after k steps it lies between √k and k
times that of one. Norms are compared per √k, so that an honest device that takes more steps is not
suspected.
"""

import math
import statistics
from collections.abc import Iterable, Sequence

from rankfleet.federated.contract.update import Update

ROUNDS, ENOUGH = 3, 4
"""Rounds whose norms are remembered, and the least number of updates that say what is usual."""


class Usual:
    """What is usual, from the norms of the last rounds; `unknown` until there are enough."""

    def __init__(self, rounds: Sequence[Sequence[float]], factor: float) -> None:
        self.factor, self._rounds = factor, [list(r) for r in rounds][-ROUNDS:]
        self._now: list[float] = []
        self._median = self._middle([n for r in self._rounds for n in r])

    @staticmethod
    def _middle(norms: Sequence[float]) -> float | None:
        return statistics.median(norms) if len(norms) >= ENOUGH else None

    @property
    def unknown(self) -> bool:
        """Is there nothing to compare with?"""
        return self._median is None and self.factor > 0

    def learn(self, updates: Iterable[Update]) -> None:
        """A first round is compared with itself."""
        self._median = self._middle([per_step(u, u.norm()) for u in updates])

    def objects(self, update: Update, norm: float) -> str:
        """Why an update is put aside; empty if it is not."""
        mine = per_step(update, norm)
        if self.factor and self._median and mine > self.factor * self._median:
            times = mine / self._median
            return (
                f"its norm is {times:.1f} times the usual one, {self.factor:g} times is taken (norm_factor)"
            )
        self._now.append(mine)
        return ""

    def remembered(self) -> list[list[float]]:
        """For the next round."""
        return [*self._rounds, self._now][-ROUNDS:]


def per_step(update: Update, norm: float) -> float:
    """Norm over the root of the steps that the device took."""
    steps = update.report.get("steps", 1)
    return norm / math.sqrt(max(1.0, float(steps) if isinstance(steps, int | float) else 1.0))
