"""One policy, one file: `bandit/policies/<name>.py` is the policy `<name>`; nothing else names it.

Third parties add policies through the entry-point group `rankfleet.policies` (`name = "package.module"`).
"""

import importlib
import importlib.metadata
from functools import cache
from pathlib import Path

from ..policy import Policy


@cache
def modules() -> dict[str, str]:
    """Policy name → import path."""
    files = sorted(Path(__file__).parent.glob("*.py"))
    rows = {p.stem: f"{__package__}.{p.stem}" for p in files if not p.stem.startswith("_")}
    for point in importlib.metadata.entry_points(group="rankfleet.policies"):
        rows.setdefault(point.name, point.value)
    return rows


@cache
def policy_class(name: str) -> type[Policy]:
    """The one class of a policy's file. Raises KeyError for a name that is not known."""
    module = importlib.import_module(modules()[name])
    classes = [
        v for v in vars(module).values()
        if isinstance(v, type) and issubclass(v, Policy) and v.__module__ == module.__name__
    ]  # fmt: skip
    if len(classes) != 1:
        raise RuntimeError(f"{module.__name__} defines {len(classes)} policies; one file is one policy")
    return classes[0]
