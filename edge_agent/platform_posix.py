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
        """Let the kernel end this process when its parent is gone, and prefer it as a victim when memory runs out."""
        if sys.platform == "linux":
            ctypes.CDLL(None, use_errno=True).prctl(1, 9, 0, 0, 0)
            with contextlib.suppress(OSError):
                Path("/proc/self/oom_score_adj").write_text("900", encoding="ascii")

    def low_priority() -> None:
        """Let everything else on the device go first."""
        with contextlib.suppress(OSError):
            os.nice(10)
