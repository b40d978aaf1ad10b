"""One program for one folder: two coordinators on one ledger, or two agents with one identity, would undo
each other's work."""

import os
import sys
from pathlib import Path

from ..errors import ConfigError

_held: list[int] = []
"""Open for the life of the process: the system lets go of the lock when it ends, however it ends."""


def hold(folder: Path, program: str) -> None:
    """Keep others out of `folder`. Raises ConfigError where one is in it."""
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT, 0o600)
    try:
        _lock(descriptor)
    except OSError:
        os.close(descriptor)
        raise ConfigError(
            f"another {program} runs with {folder}", "stop it first, or give this one a folder of its own"
        ) from None
    _held.append(descriptor)


def _lock(descriptor: int) -> None:
    if sys.platform == "win32":
        import msvcrt

        msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
    else:
        import fcntl

        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
