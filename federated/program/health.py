"""Declared conditions: what can be wrong with a running program, how bad it is, and which of them is
behind which.

`status`, `doctor` and the metrics show the same ones, under codes that stay.
"""

from collections.abc import Callable, Iterable
from typing import Any, Generic, Literal, TypeVar

import msgspec

P = TypeVar("P")
Severity = Literal["warning", "error"]


class Condition(msgspec.Struct, frozen=True, kw_only=True):
    """One that holds now."""

    code: str
    severity: Severity
    text: str
    do: str = ""


class Declared(Generic[P]):
    """One that may hold: `look` gives the text, or an empty one. It is not shown while one of `depends_on`
    holds, its cause."""

    def __init__(
        self,
        code: str,
        severity: Severity,
        look: Callable[[P], str],
        do: str = "",
        depends_on: tuple[str, ...] = (),
    ) -> None:
        self.code, self.severity, self.look, self.do, self.depends_on = code, severity, look, do, depends_on


def holding(declared: Iterable[Declared[P]], program: P) -> list[Condition]:
    """What holds now, causes before symptoms, symptoms of a cause that holds left out. A look that fails
    is a condition too."""
    found: list[Condition] = []
    for d in declared:
        if any(c.code in d.depends_on for c in found):
            continue
        try:
            text = d.look(program)
        except Exception as error:
            text = f"this cannot be told: {type(error).__name__}: {error}"
        if text:
            found.append(Condition(code=d.code, severity=d.severity, text=text, do=d.do))
    return found


def plain(conditions: Iterable[Condition]) -> list[dict[str, Any]]:
    """As JSON has it."""
    return [msgspec.to_builtins(c) for c in conditions]
