"""Matrix products of a training step, each at its best alone: python -m benchmarks.sides.gemm WORK KEY
NUMERICS STEPS HOME THREADS.

Prints one JSON line: seconds of all steps, and the sum of the best times of the products in them.
"""

import json
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

from rankfleet.edge_agent.worker.__main__ import environment

PRODUCTS = (
    "aten::mm",
    "aten::addmm",
    "aten::bmm",
    "aten::baddbmm",
    "mkldnn::_linear_pointwise",
    "aten::linear",
)
BEST_OF = 7


def main() -> None:
    """Run."""
    environment()
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode

    from . import ours
    from . import work as works

    name, key, numerics, steps, home, threads = sys.argv[1:]
    torch.set_num_threads(int(threads))
    work = works.make(name, Path(home), int(steps))
    seen: Counter[Any] = Counter()
    calls: dict[Any, Any] = {}

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if op.name().split(".")[0] in PRODUCTS:
                made, options = (
                    [shape_of(a) for a in args],
                    {k: shape_of(a) for k, a in (kwargs or {}).items()},
                )
                name = f"{op} {made} {options}"
                seen[name] += 1
                calls[name] = (op, made, options)
            return op(*args, **(kwargs or {}))

    ours.train(work, key, numerics, lambda: None)  # kernels and pages are there afterwards
    whole, _ = ours.train(work, key, numerics, lambda: None)
    watch = Watch()
    ours.train(work, key, numerics, watch.__enter__)
    watch.__exit__(None, None, None)
    best = {n: alone(*calls[n]) for n in seen}
    print(
        json.dumps(
            {
                "step_s": sum(whole),
                "gemm_s": sum(best[n] * c for n, c in seen.items()),
                "products": sum(seen.values()),
            }
        )
    )


def shape_of(value: Any) -> Any:
    """A tensor's shape, strides and dtype; anything else as it is."""
    return (tuple(value.shape), value.stride(), value.dtype) if hasattr(value, "stride") else value


def alone(op: Any, shapes: list[Any], options: dict[str, Any]) -> float:
    """Best seconds of a product with fresh inputs of the same shapes and strides."""
    import torch

    def fresh(a: Any) -> Any:
        if not (isinstance(a, tuple) and len(a) == 3 and isinstance(a[2], torch.dtype)):
            return a
        return torch.empty_strided(a[0], a[1], dtype=a[2]).fill_(0.01)

    args = [fresh(a) for a in shapes]
    kwargs = {k: fresh(v) for k, v in options.items()}
    times = []
    for _ in range(BEST_OF):
        start = time.perf_counter()
        op(*args, **kwargs)
        times.append(time.perf_counter() - start)
    return min(times)


if __name__ == "__main__":
    main()
