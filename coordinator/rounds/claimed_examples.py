"""What a device claims about itself weighs: its number of examples is bounded by what others and it itself
said before, and noted.

Nobody but the device can count its examples. What can be seen is a claim that is out of proportion, and
one that jumps.
"""

import statistics
from collections.abc import Iterable, Mapping

JUMP = 2.0


def bounds(claimed: Mapping[str, float], before: Mapping[str, float], most: float) -> dict[str, float]:
    """Device → the largest number of examples that counts for it in this round."""
    if not most or not claimed:
        return {}
    middle = statistics.median(claimed.values())
    return {
        d: min(most * middle, JUMP * max(before[d], middle) if d in before else most * middle)
        for d in claimed
    }


def notes(
    claimed: Mapping[str, float], before: Mapping[str, float], allowed: Mapping[str, float]
) -> Iterable[tuple[str, str]]:
    """(device, text) for the log of events: claims that jumped, or that do not count whole."""
    for device, examples in sorted(claimed.items()):
        if device in before and not before[device] / JUMP <= examples <= before[device] * JUMP:
            yield device, f"it claims {examples:.0f} examples, {before[device]:.0f} before"
        if examples > allowed.get(device, examples):
            yield device, f"of the {examples:.0f} examples that it claims {allowed[device]:.0f} count"
