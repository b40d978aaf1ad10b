"""Aggregation of a MiniLM adapter (rank 8, all linear maps, 332k numbers): streamed, dense accumulator, QR
of the whole stack.

The peers' ways are the second and third: FlexLoRA forms the dense product, FLoRA stacks. Milliseconds per
update. `drift` is the size of the deltas beside the factors: a thousandth in a round of fine-tuning; at 1
the cross term dominates and more passes are made.
"""

import os
import tracemalloc
from functools import partial

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # as the service asks for

import numpy as np

from rankfleet.coordinator.aggregate import combine, streaming
from rankfleet.coordinator.aggregate.kept import Decoded, Keeper
from rankfleet.coordinator.aggregate.stacked import Term
from rankfleet.coordinator.store.versions import Version
from rankfleet.federated.contract.catalogue import build_stack
from rankfleet.federated.contract.server_side import ServerSide
from rankfleet.federated.contract.spec import Pair, Spec
from rankfleet.federated.contract.stack import Stack
from rankfleet.federated.contract.tensors import Array, Tensors
from rankfleet.federated.contract.update import LowRank, Update

from .table import interleaved, report

SHAPES = [(384, 384)] * 4 + [(1536, 384), (384, 1536)]
LAYERS, RANK = 6, 8


def updates(count: int, drift: float) -> list[Update]:
    """Devices of one class: they share the view."""
    rng = np.random.default_rng(0)
    names = {f"l{i}.{n}": s for i in range(LAYERS) for n, s in enumerate(SHAPES)}
    spec = Spec({k: Pair(0, o, i, RANK, 2.0, o, i, "v") for k, (o, i) in names.items()}, {})

    def arrays(size: float) -> dict[str, Array]:
        return {
            f"{k}.{s}": np.float32(size)
            * rng.standard_normal((o, RANK) if s == "B" else (RANK, i), np.float32)
            for k, (o, i) in names.items()
            for s in "AB"
        }

    view = arrays(1.0)
    return [Update(f"d{n:03}", 1.0, arrays(drift), spec, view, origin="v") for n in range(count)]


def streamed(found: list[Update], old: dict[str, LowRank]) -> None:
    """What we do."""
    streaming.product(found, old, len(found))


def by_dense(found: list[Update], old: dict[str, LowRank]) -> None:
    """Dense fp32 products, summed, then a full SVD per module."""
    for module, pair in old.items():
        total = (pair.B @ pair.A).astype(np.float32)
        for u in found:
            b0, a0, db, da = (
                u.view[f"{module}.B"],
                u.view[f"{module}.A"],
                u.delta[f"{module}.B"],
                u.delta[f"{module}.A"],
            )
            total += 2.0 / len(found) * ((b0 + db) @ (a0 + da) - b0 @ a0)
        np.linalg.svd(total, full_matrices=False)


def by_stack(found: list[Update], old: dict[str, LowRank]) -> None:
    """QR of all stacked factors, 2r columns a device, and a small SVD."""
    for module, pair in old.items():
        terms = [Term(pair.B, pair.A)] + [Term(*u.factors(module)) for u in found]
        _, rb = np.linalg.qr(np.concatenate([t.B for t in terms], axis=1))
        _, ra = np.linalg.qr(np.concatenate([t.A for t in terms], axis=0).T)
        np.linalg.svd(rb @ ra.T)


MEMORY = (
    ("fedbuff", "product"),
    ("fedbuff", "factors"),
    ("norm_bound", "factors"),
    ("fedadam", ""),
    ("fedit", ""),
    ("ffa_lora", ""),
)
"""Stacks whose closing must take no more for a thousand devices than for ten."""


def peak_mb(name: str, space: str, count: int) -> float:
    """What closing a round of `count` stored updates takes beside the adapter itself: NumPy's and Python's
    peak, MB."""
    like = updates(1, 1e-3)[0]
    keeper = Keeper()

    def decoded(n: int) -> Tensors:
        rng = np.random.default_rng(n)
        return {k: np.float32(1e-3) * rng.standard_normal(t.shape, np.float32) for k, t in like.sent.items()}

    many = (
        Update(f"d{n:04}", 1.0, Decoded(keeper, partial(decoded, n)), like.spec, like.view, origin="v")
        for n in range(count)
    )
    old = Version(
        0, {m: LowRank(like.view[f"{m}.B"], like.view[f"{m}.A"]) for m in like.spec.pairs}, {}, {}, {}
    )
    server = ServerSide(Stack(build_stack([name]), space), "bench", 1)
    tracemalloc.start()
    combine.next_version(server, old, many, count, 0)
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return most / 1e6


def main() -> None:
    """10 and 50 devices; memory with 10 and with 1,000, or 200 by `SCALE=quick`; the keeper is full with
    100."""
    rows = []
    for count, drift in ((10, 1e-3), (50, 1e-3), (50, 1.0)):
        found = updates(count, drift)
        rng = np.random.default_rng(1)
        old = {
            m: LowRank(rng.standard_normal((p.out, RANK)), rng.standard_normal((RANK, p.in_)))
            for m, p in found[0].spec.pairs.items()
        }
        work = {"streamed": streamed, "dense": by_dense, "stack": by_stack}
        times = interleaved({k: partial(f, found, old) for k, f in work.items()}, repeats=3)
        rows.append(
            {
                "devices": count,
                "drift": drift,
                **{f"{k}_ms_per_update": round(1e3 * t / count, 2) for k, t in times.items()},
                "dense_over_ours": round(times["dense"] / times["streamed"], 1),
                "stack_over_ours": round(times["stack"] / times["streamed"], 1),
            }
        )
    report("aggregate", rows, numbers=332_000)
    few, many = (100, 200) if os.environ.get("SCALE") == "quick" else (100, 1000)
    report(
        "aggregate_memory",
        [
            {"stack": n, "space": s, **{f"mb_{c}": round(peak_mb(n, s, c), 1) for c in (10, few, many)}}
            for n, s in MEMORY
        ],
        numbers=332_000,
    )


if __name__ == "__main__":
    main()
