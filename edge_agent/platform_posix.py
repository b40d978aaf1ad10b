"""Linux and macOS."""

import contextlib
import ctypes
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

if sys.platform != "win32":
    import fcntl
    import resource

    @contextlib.contextmanager
    def slot(count: int | None) -> Iterator[None]:
        """Hold one of the machine's training slots, one per core unless told otherwise; agents on one machine share them."""
        folder = Path(tempfile.gettempdir()) / f"rankfleet-slots-{os.getuid()}"
        folder.mkdir(mode=0o700, exist_ok=True)
        total = count or os.cpu_count() or 1
        while True:
            for n in range(total):
                file = os.open(folder / str(n), os.O_RDWR | os.O_CREAT, 0o600)
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except OSError:
                    os.close(file)
                    continue
                try:
                    yield
                finally:
                    os.close(file)
                return
            time.sleep(0.05)

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
