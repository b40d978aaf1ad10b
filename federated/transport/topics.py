"""Every MQTT topic, in one place.

rf/<fleet>/dev/<device>/up       device → coordinator: sealed messages rf/<fleet>/dev/<device>/chunk
device → coordinator: pieces of an update rf/<fleet>/dev/<device>/down     coordinator → device: sealed
messages rf/<fleet>/dev/<device>/job      coordinator → device: the current assignment, retained (the only
retained topic) rf/<fleet>/blob/<digest>         coordinator → whoever wants it: pieces of views and masks
"""

import re
from dataclasses import dataclass

from ..errors import ConfigError

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}\Z")


def checked(name: str, what: str = "device") -> str:
    """`name`, if it can stand in a topic and in a file name. Raises ConfigError."""
    if not NAME.match(name):
        raise ConfigError(
            f"{what} name {name[:80]!r} is not allowed",
            "use 1 to 64 letters, digits, `-`, `_` and `.`, starting with a letter or digit",
        )
    return name


@dataclass(frozen=True)
class Topics:
    """The topics of one fleet."""

    fleet: str

    def device(self, device: str, kind: str) -> str:
        """A device's topic; `+` for all devices."""
        return f"rf/{self.fleet}/dev/{device}/{kind}"

    def blob(self, digest: str) -> str:
        """Where the pieces of a blob are published."""
        return f"rf/{self.fleet}/blob/{digest}"


def device_of(topic: str) -> str:
    """The device in a device topic; empty where there is none."""
    parts = topic.split("/")
    return parts[3] if len(parts) == 5 and parts[2] == "dev" and NAME.match(parts[3]) else ""


def matches(pattern: str, topic: str) -> bool:
    """Does an MQTT subscription pattern (`+` one level, `#` the rest) cover a topic?"""
    want, have = pattern.split("/"), topic.split("/")
    for i, part in enumerate(want):
        if part == "#":
            return True
        if i >= len(have) or part not in ("+", have[i]):
            return False
    return len(want) == len(have)
