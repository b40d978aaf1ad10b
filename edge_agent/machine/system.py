"""What differs between operating systems, chosen once; and what is built on it."""

import contextlib
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

if sys.platform == "win32":
    from .platform_win32 import (
        available_mb,
        die_with_parent,
        low_priority,
        owner,
        peak_rss_mb,
        pin,
        steady_memory,
        try_lock,
    )
else:
    from .platform_posix import (
        available_mb,
        die_with_parent,
        low_priority,
        owner,
        peak_rss_mb,
        pin,
        steady_memory,
        try_lock,
    )


@contextlib.contextmanager
def slot(count: int | None) -> Iterator[None]:
    """Hold one of the machine's training slots, one per core unless told otherwise; agents on one machine
    share them."""
    folder = Path(tempfile.gettempdir()) / f"rankfleet-slots-{owner()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    files = [
        os.open(folder / str(n), os.O_RDWR | os.O_CREAT, 0o600) for n in range(count or os.cpu_count() or 1)
    ]
    try:
        while not any(try_lock(file) for file in files):
            time.sleep(0.05)
        yield
    finally:
        for file in files:
            os.close(file)


_halted = False


def halt() -> None:
    """The worker is told to leave at the end of the step that it is in."""
    global _halted
    _halted = True


def halted() -> bool:
    """Was it told so?"""
    return _halted


__all__ = [
    "available_mb",
    "die_with_parent",
    "halt",
    "halted",
    "low_priority",
    "peak_rss_mb",
    "pin",
    "slot",
    "steady_memory",
]
