"""Windows. Type-checked; not yet run on Windows."""

import os
import sys

if sys.platform == "win32":
    import msvcrt

    def try_lock(file: int) -> bool:
        """Take the file's lock if it is free; closing the file gives it back."""
        try:
            msvcrt.locking(file, msvcrt.LK_NBLCK, 1)
        except OSError:
            return False
        return True

    def owner() -> str:
        """What tells this user's files from another's in a common folder."""
        return os.environ.get("USERNAME", "user")

    def peak_rss_mb() -> float:
        """Highest working set of this process so far."""
        import psutil

        return float(psutil.Process().memory_info().peak_wset) / (1 << 20)

    def available_mb() -> float:
        """Memory that can be had without swapping."""
        import psutil

        return float(psutil.virtual_memory().available) / (1 << 20)

    def die_with_parent() -> None:
        """The end of standard input ends the worker; nothing more to do."""

    def low_priority() -> None:
        """Let everything else on the device go first, at the processor and at the disk."""
        import psutil

        psutil.Process().nice(psutil.BELOW_NORMAL_PRIORITY_CLASS)
        psutil.Process().ionice(psutil.IOPRIO_LOW)

    def steady_memory() -> None:
        """The system's heap gives large blocks back by itself."""

    def pin(threads: int) -> list[int]:
        """The scheduler knows fast cores from slow ones."""
        return []
