"""Windows. Type-checked; not yet run on Windows."""

import contextlib
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

if sys.platform == "win32":
    import msvcrt

    @contextlib.contextmanager
    def slot(count: int | None) -> Iterator[None]:
        """Hold one of the machine's training slots."""
        folder = Path(tempfile.gettempdir()) / "rankfleet-slots"
        folder.mkdir(exist_ok=True)
        total = count or os.cpu_count() or 1
        while True:
            for n in range(total):
                file = os.open(folder / str(n), os.O_RDWR | os.O_CREAT)
                try:
                    msvcrt.locking(file, msvcrt.LK_NBLCK, 1)
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
        """Let everything else on the device go first."""
        import psutil

        psutil.Process().nice(psutil.BELOW_NORMAL_PRIORITY_CLASS)
