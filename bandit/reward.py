"""What a round brought, as a number that policies learn from."""

import math

from .policy import Outcome


def rate(o: Outcome) -> float:
    """Relative loss drop per second, never negative; 0 where nothing was told, which `Outcome.unknown`
    tells apart."""
    if o.loss_before is None or o.drop is None:
        return 0.0
    drop = o.drop / (abs(o.loss_before) + 1e-9)
    return max(0.0, drop) / max(o.seconds, 1e-3) if math.isfinite(drop) else 0.0
