"""DBW: wait for as many updates as pay, k = argmax Ĝ(k)/T̂(k) (Xu, Neglia, Sebastianelli, 2021).

Ĝ(k) = (1 - c/2)·‖∇F‖² - (c/2)·V/k with V the variance of one update, ‖∇F‖² ≈ ‖ḡ‖² - V/n, in units of the
rate; T̂(k) the mean time of the k-th arrival, made monotone. c = L·η is a setting (theirs is estimated);
estimates are smoothed by 0.7. A device that was not heard for `silence` rounds is waited for.
"""

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar

import numpy as np
from msgspec import Meta

from ...contract.contexts import Arrival, ServerContext
from ...contract.method import Method
from ...contract.tensors import Array
from ...contract.update import Update

SMOOTH = 0.7


class DbwBackupWorkers(Method, frozen=True):
    """`ready` at k arrivals, `step` learns from them."""

    space: ClassVar[str] = "factors"
    needs_all: ClassVar[bool] = True
    timed: ClassVar[bool] = True
    evidence: ClassVar[str] = "toy-checked"
    use_when: ClassVar[str] = "a few devices are much slower than the others; with `late: drop`"

    curvature: Annotated[float, Meta(gt=0, description="L·η of a round's mean update")] = 0.5
    silence: Annotated[int, Meta(ge=1, description="rounds after which a device is waited for")] = 10

    def ready(
        self, arrived: Sequence[Arrival], out: Sequence[str], elapsed: float, ctx: ServerContext
    ) -> bool:
        """k are there, and nobody who was silent for long is out."""
        heard = ctx.state.get("heard", {})
        owed = [d for d in out if ctx.round.number - heard.get(d, 0) >= self.silence]
        return not out or (len(arrived) >= ctx.state.get("k", len(arrived) + len(out)) and not owed)

    def step(self, change: Mapping[str, Any], ctx: ServerContext) -> Mapping[str, Any]:
        """Estimates of gain and time, and the next k."""
        state, n = ctx.state, len(ctx.updates)
        state.setdefault("heard", {}).update({u.device: ctx.round.number for u in ctx.updates})
        if n < 2:
            return change
        spread, signal = moments(ctx.updates, change)
        for key, now in (("spread", spread), ("signal", signal)):
            state[key] = SMOOTH * state[key] + (1 - SMOOTH) * now if key in state else now
        times = np.sort([float(u.report.get("seconds", 1.0)) for u in ctx.updates])
        state["times"] = smoothed(np.asarray(state.get("times", [])), times)
        counts, c = np.arange(1, len(state["times"]) + 1), self.curvature
        gain = (1 - c / 2) * state["signal"] - c / 2 * state["spread"] / counts
        state["k"] = max(2, 1 + int(np.argmax(gain / np.maximum(state["times"], 1e-6))))
        return change


def moments(updates: Sequence[Update], change: Mapping[str, Any]) -> tuple[float, float]:
    """(V, ‖∇F‖²): the variance of one update around the mean, and the mean's square without what variance
    adds to it."""
    mean = {k: np.asarray(t, np.float64) for k, t in change.items()}
    n = len(updates)
    spread = sum(
        float(np.square(u.delta[k] - t).sum()) for u in updates for k, t in mean.items() if k in u.delta
    ) / (n - 1)
    return spread, max(sum(float(np.square(t).sum()) for t in mean.values()) - spread / n, 1e-12)


def smoothed(old: Array, new: Array) -> Array:
    """T̂: times of the k-th arrival, old ones where fewer arrived, never falling."""
    times = np.concatenate([new, old[len(new) :]]).astype(np.float64)
    both = min(len(old), len(new))
    times[:both] = SMOOTH * old[:both] + (1 - SMOOTH) * new[:both]
    return np.maximum.accumulate(times).astype(np.float32)
