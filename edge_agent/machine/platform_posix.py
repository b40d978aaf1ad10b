"""Linux and macOS."""

import contextlib
import ctypes
import os
import sys
from pathlib import Path

if sys.platform != "win32":
    import fcntl
    import resource

    def try_lock(file: int) -> bool:
        """Take the file's lock if it is free; closing the file gives it back."""
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return False
        return True

    def owner() -> str:
        """What tells this user's files from another's in a common folder."""
        return str(os.getuid())

    def peak_rss_mb() -> float:
        """Highest resident memory of this process so far."""
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak / (1 << 20 if sys.platform == "darwin" else 1 << 10)

    def available_mb() -> float:
        """Memory that can be had without swapping."""
        import psutil

        return float(psutil.virtual_memory().available) / (1 << 20)

    def die_with_parent() -> None:
        """Let the kernel end this process when its parent is gone, and prefer it as a victim when memory
        runs out."""
        if sys.platform == "linux":
            ctypes.CDLL(None, use_errno=True).prctl(1, 9, 0, 0, 0)
            with contextlib.suppress(OSError):
                Path("/proc/self/oom_score_adj").write_text("900", encoding="ascii")

    def steady_memory() -> None:
        """Large blocks go back to the system when they are freed: glibc would keep ever larger ones, and
        peaks would differ by a third."""
        with contextlib.suppress(OSError, AttributeError):  # other C libraries have no such knob
            for knob, size in ((-3, 4 << 20), (-1, 32 << 20)):  # M_MMAP_THRESHOLD, M_TRIM_THRESHOLD
                ctypes.CDLL(None).mallopt(knob, size)

    def low_priority() -> None:
        """Let everything else on the device go first, at the processor and at the disk."""
        import psutil

        with contextlib.suppress(OSError):
            os.nice(10)
        if sys.platform == "linux":
            with contextlib.suppress(psutil.Error, OSError):
                psutil.Process().ionice(psutil.IOPRIO_CLASS_IDLE)

    def pin(threads: int, cpus: Path = Path("/sys/devices/system/cpu")) -> list[int]:
        """Keep this process on the fastest cores, where some are slower than others (big.LITTLE): a step
        waits for its slowest thread.

        Not where two threads share a core: the fastest ones would often be two halves of one.
        """
        if sys.platform != "linux" or _number(cpus / "smt" / "active"):
            return []
        mine = sorted(os.sched_getaffinity(0))
        speeds = {n: _number(cpus / f"cpu{n}" / "cpu_capacity") for n in mine}
        if len(set(speeds.values())) < 2 or threads >= len(mine):
            return []
        chosen = sorted(sorted(mine, key=lambda n: (-speeds[n], n))[:threads])
        os.sched_setaffinity(0, chosen)
        return chosen

    def _number(file: Path) -> int:
        try:
            return int(file.read_text(encoding="ascii"))
        except (OSError, ValueError):
            return 0
