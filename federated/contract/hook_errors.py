"""What a hook returned that it must not, said by method, hook and name, so that its author need not look
into the engine."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ..errors import HookError

PLAIN = (str, bytes, bool, int, float, type(None), np.ndarray, np.generic)
"""What `ctx.state` may hold, beside dictionaries, lists and tuples of it."""


ORDINARY = (
    ArithmeticError, AssertionError, AttributeError, LookupError,
    NameError, NotImplementedError, TypeError, ValueError,
)  # fmt: skip
"""Mistakes of whoever wrote a hook. Memory that ran out, our own errors and a worker that is told to leave
are others: they pass, since whoever waits for them goes by their kind."""


def run_hook(name: str, method: Any, hook: str, *args: Any) -> Any:
    """What a hook returns. Raises HookError, with method and hook, for an ordinary mistake in it."""
    try:
        return getattr(method, hook)(*args)
    except ORDINARY as error:
        raise HookError(name, hook, f"{type(error).__name__}: {error}") from error
    except RuntimeError as error:
        if type(error) is not RuntimeError or "memory" in str(error):
            raise
        raise HookError(name, hook, f"RuntimeError: {error}") from error


def check_mapping(method: str, hook: str, result: Any) -> Mapping[str, Any]:
    """`result`, if it is a dictionary. Raises HookError."""
    if not isinstance(result, Mapping):
        raise HookError(
            method, hook, f"returns {_kind(result)}, which is no dictionary", "return a dictionary by name"
        )
    return result


def check_tensors(
    method: str,
    hook: str,
    result: Any,
    like: Mapping[str, Any] | None = None,
    *,
    torch: bool = False,
    whole: bool = False,
) -> None:
    """Is `result` a dictionary of NumPy arrays (`torch`: of tensors)? Raises HookError.

    `like`: the names that it may have, with something that has the `shape` that each must have. `whole`:
    all of them must be there.
    """
    check_mapping(method, hook, result)
    for name, value in result.items():
        if torch != hasattr(value, "detach") or not hasattr(value, "dtype"):
            wanted = "a torch tensor" if torch else "a NumPy array"
            raise HookError(method, hook, f"gives `{name}` as {_kind(value)}, not as {wanted}", _way(torch))
        if not torch and value.dtype.kind not in "fiub":
            raise HookError(
                method, hook, f"gives `{name}` in dtype {value.dtype}", "use a float, integer or bool dtype"
            )
        if like is None:
            continue
        if name not in like:
            raise HookError(
                method, hook, f"gives `{name}`, which is not asked for", f"the names are {_some(like)}"
            )
        if tuple(value.shape) != tuple(like[name].shape):
            raise HookError(
                method,
                hook,
                f"gives `{name}` of shape {tuple(value.shape)} instead of {tuple(like[name].shape)}",
            )
    if whole and like is not None and (missing := [k for k in like if k not in result]):
        raise HookError(method, hook, f"leaves out `{missing[0]}`", "return every name that came in")


def check_state(method: str, hook: str, state: Mapping[str, Any]) -> None:
    """Can `state` be saved? Raises HookError with the place of the first value that cannot."""
    _walk(method, hook, state, "")


def _walk(method: str, hook: str, value: Any, place: str) -> None:
    if isinstance(value, Mapping):
        for key, inner in value.items():
            _walk(method, hook, inner, f"{place}.{key}" if place else str(key))
    elif isinstance(value, list | tuple):
        for number, inner in enumerate(value):
            _walk(method, hook, inner, f"{place}[{number}]")
    elif not isinstance(value, PLAIN):
        way = (
            _way(False)
            if hasattr(value, "detach")
            else "keep arrays, numbers, texts, and lists or dictionaries of them"
        )
        raise HookError(
            method, hook, f"leaves {_kind(value)} in `ctx.state` as `{place}`, which cannot be saved", way
        )


def _kind(value: Any) -> str:
    return f"a {'torch ' if hasattr(value, 'detach') else ''}{type(value).__name__}"


def _way(torch: bool) -> str:
    return (
        "make it one with `torch.from_numpy`"
        if torch
        else "`tensor.detach().cpu().numpy()` makes one of a torch tensor"
    )


def _some(names: Mapping[str, Any] | Sequence[str]) -> str:
    shown = sorted(names)
    return ", ".join(f"`{n}`" for n in shown[:4]) + (f" and {len(shown) - 4} more" if len(shown) > 4 else "")
