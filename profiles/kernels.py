"""Times of a frozen map's products as a device measured them: by bits of the weights and by width, and
what is read from them.

Keys are `<bits>` at the smallest width (what older agents send) and `<bits>@<width>`; values are
milliseconds.
"""

from collections.abc import Mapping

WIDTHS = (384, 896, 2048)
"""Hidden sizes at which a device measures; feed-forward maps have four times as many rows."""
WORTH = 0.9
"""16 bits are computed with only where they take less than this share of the time of 32."""


def key(bits: int, width: int) -> str:
    """The name of a time."""
    return str(bits) if width == WIDTHS[0] else f"{bits}@{width}"


def times(measured: Mapping[str, float], hidden: int) -> dict[int, float]:
    """Milliseconds by bits at the measured width that is nearest to a model's; by ratio, as costs grow
    with the square."""
    order = sorted(WIDTHS, key=lambda w: max(w, hidden) / min(w, max(1, hidden)))
    for width in order:
        if found := {
            bits: measured[key(bits, width)] for bits in (32, 16, 8, 4) if key(bits, width) in measured
        }:
            return found
    return {}


def half(measured: Mapping[str, float], hidden: int) -> bool:
    """Should maps of 8 and 4 bits be computed with in bf16? Never assumed: without such instructions it is
    25 to 40 times slower."""
    found = times(measured, hidden)
    return 16 in found and 32 in found and found[16] < WORTH * found[32]
