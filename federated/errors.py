"""Every error of the product, one tree.

RankfleetError
├── ConfigError            a file or a job that cannot be meant
│   ├── UnknownMethod      no such method in the catalogue
│   ├── Conflict           two methods of a stack that exclude each other
│   └── HookError          a method's hook that gives what it must not
├── WireError              bytes that are not what they claim to be
│   ├── TooLarge           over a limit, refused before it is read
│   ├── WrongVersion       another protocol version
│   └── NotFinite          NaN or infinity in numbers that must be finite
├── Refused                a device or the coordinator says no, with the reason
│   └── DoesNotFit         an arm that the device cannot hold
└── Unreachable            broker or coordinator does not answer
"""


class RankfleetError(Exception):
    """What happened, with the value; `hint` says what to do about it."""

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.hint = hint

    def __str__(self) -> str:
        text = super().__str__()
        return f"{text}\n  try: {self.hint}" if self.hint else text


class ConfigError(RankfleetError):
    """A file or a job that cannot be meant."""


class UnknownMethod(ConfigError):
    """No method of that name in the catalogue."""


class Conflict(ConfigError):
    """Two methods of a stack exclude each other."""


class HookError(ConfigError):
    """A hook of a method gives what it must not; says so by method and hook."""

    def __init__(self, method: str, hook: str, what: str, hint: str = "") -> None:
        super().__init__(f"method `{method}`, hook `{hook}`: {what}", hint)


class WireError(RankfleetError):
    """Bytes that are not what they claim to be."""


class TooLarge(WireError):
    """Over a limit; refused before it is read."""


class WrongVersion(WireError):
    """Another protocol version."""


class NotFinite(WireError):
    """NaN or infinity in numbers that must be finite."""


class Refused(RankfleetError):
    """A device or the coordinator says no; the message is the reason."""


class DoesNotFit(Refused):
    """An arm that the device cannot hold."""


class Unreachable(RankfleetError):
    """Broker or coordinator does not answer."""
