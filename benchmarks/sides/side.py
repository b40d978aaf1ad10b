"""One side on one workload, in a process of its own: python -m benchmarks.sides.side ours|peer WORK KEY
NUMERICS STEPS HOME THREADS.

Prints one JSON line: seconds a step (median of all but the first tenth), tokens a second, losses, peak
memory.
"""

import json
import statistics
import sys
import threading
import time
from pathlib import Path
from typing import Any


def rss_mb() -> float:
    """Resident memory now."""
    import psutil

    return float(psutil.Process().memory_info().rss) / 1e6


class Peak:
    """Highest resident and proportional memory of this process, sampled."""

    def __init__(self) -> None:
        import psutil

        self.rss = self.pss = self.base = 0.0
        self._process = psutil.Process()
        threading.Thread(target=self._watch, daemon=True).start()

    def _watch(self) -> None:
        number = 0
        while True:
            self.rss = max(self.rss, self._process.memory_info().rss / 1e6)
            if number % 10 == 0 and hasattr(self._process, "memory_full_info"):
                self.pss = max(self.pss, getattr(self._process.memory_full_info(), "pss", 0) / 1e6)
            number += 1
            time.sleep(0.01)


def main() -> None:
    """Run."""
    side, name, key, numerics, steps, home, threads = sys.argv[1:]
    if side == "ours":  # as the worker sets them
        from rankfleet.edge_agent.worker.__main__ import environment

        environment()
    import torch

    if side == "peer":
        import peft  # noqa: F401
        import transformers

        transformers.logging.set_verbosity_error()  # type: ignore[no-untyped-call]
        from . import peer as module
    else:
        from . import ours as module  # type: ignore[no-redef]
    from . import work as works

    torch.set_num_threads(int(threads))
    work = works.make(name, Path(home), int(steps))
    before, peak = rss_mb(), Peak()
    state: dict[str, Any] = {}
    seconds, losses = module.train(work, key, numerics, lambda: state.update(loaded=rss_mb()))
    late = max(1, len(seconds) // 10)
    rate = sum(work.tokens()[late:]) / sum(seconds[late:])
    print(json.dumps({
        "step_s": statistics.median(seconds[late:]), "tokens_per_s": rate,
        "loss": statistics.mean(losses[-10:]), "first": losses[0],
        "imports_mb": before, "loaded_mb": state["loaded"], "peak_mb": peak.rss, "pss_mb": peak.pss,
    }))  # fmt: skip


if __name__ == "__main__":
    main()
