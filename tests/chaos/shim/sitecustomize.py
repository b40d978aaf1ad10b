"""Loaded by every Python process of a node under test: its disk forgets what was not synced, fills up, and
its clock is wrong.

CHAOS_HOME is the node's home, CHAOS_SIDE a folder beside it. At every sync what is durable from now on is
copied to the side: `names.json` and `content/<inode>`. So whoever kills the node with everything it runs
can build what a power cut would have left.
"""

import fcntl
import json
import os
import shutil
import time

HOME, SIDE = os.environ.get("CHAOS_HOME", ""), os.environ.get("CHAOS_SIDE", "")


def names() -> "dict[str, int]":
    """Path below the home → inode; folders end with a slash."""
    found = {}
    for folder, _, files in os.walk(HOME):
        found[os.path.relpath(folder, HOME) + os.sep] = 0
        for name in files:
            path = os.path.join(folder, name)
            try:
                found[os.path.relpath(path, HOME)] = os.lstat(path).st_ino
            except FileNotFoundError:
                continue
    return found


def install() -> None:
    """Take the place of what the operating system offers."""
    fsync, clock, clock_ns, ticks = os.fsync, time.time, time.time_ns, time.monotonic
    offset, looked = 0.0, -1.0

    def our_fsync(descriptor: int) -> None:
        path = os.readlink(f"/proc/self/fd/{descriptor}")
        if not path.startswith(HOME):
            fsync(descriptor)
            return
        if os.path.exists(os.path.join(SIDE, "full")):
            raise OSError(28, "No space left on device")
        if os.path.isfile(path):
            _replaced(
                os.path.join(SIDE, "content", str(os.fstat(descriptor).st_ino)),
                lambda part: shutil.copyfile(path, part),
            )
        with open(os.path.join(SIDE, "lock"), "w", encoding="ascii") as lock:
            fcntl.flock(
                lock, fcntl.LOCK_EX
            )  # service and worker: an older list must not take the place of a newer one
            _replaced(os.path.join(SIDE, "names.json"), _write_names)

    def wrong_by() -> float:
        nonlocal offset, looked
        if ticks() - looked > 0.2:
            looked = ticks()
            try:
                with open(os.path.join(SIDE, "clock"), encoding="ascii") as file:
                    offset = float(file.read() or 0)
            except (OSError, ValueError):
                pass
        return offset

    os.fsync = our_fsync
    time.time = lambda: clock() + wrong_by()
    time.time_ns = lambda: clock_ns() + int(wrong_by() * 1e9)


def _write_names(part: str) -> None:
    with open(part, "w", encoding="utf-8") as file:
        json.dump(names(), file)


def _replaced(target: str, make: "object") -> None:
    part = f"{target}.{os.getpid()}"
    make(part)  # type: ignore[operator]
    os.replace(part, target)


if HOME and SIDE:
    install()
