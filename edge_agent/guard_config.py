"""When a device may train: what its owner says in the agent's YAML."""

from datetime import datetime
from typing import Annotated

import msgspec
from msgspec import Meta


class GuardConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """When the device may train. Everything that is left out allows."""

    battery_percent: Annotated[float, Meta(ge=0, le=100)] = 30.0
    """On battery only above this charge; 100: never on battery."""
    max_celsius: Annotated[float, Meta(gt=0)] = 90.0
    """Hottest sensor; training goes on 5 degrees below."""
    min_free_mb: Annotated[float, Meta(ge=0)] = 150.0
    """Memory that is left to others."""
    metered: bool = True
    """May it work over a network that the system calls metered?"""
    idle_s: Annotated[float, Meta(ge=0)] = 0.0
    """Only when nobody has typed on this machine's terminals for so long; 0: whenever."""
    busy_percent: Annotated[float, Meta(gt=0, le=100)] | None = None
    """Not while other programs take more of the processor."""
    hours: str = ""
    """Only between these, in local time: `22:00-06:30`; empty: at any hour."""

    def __post_init__(self) -> None:
        if self.hours:
            span(self.hours)


def span(hours: str) -> tuple[int, int]:
    """Minutes of the day at which a span begins and ends. Raises ValueError."""
    try:
        minutes = [datetime.strptime(part.strip(), "%H:%M") for part in hours.split("-")]
        begin, end = (m.hour * 60 + m.minute for m in minutes)
    except ValueError:
        raise ValueError(f"`hours` is {hours!r}, not like 22:00-06:30") from None
    return begin, end
