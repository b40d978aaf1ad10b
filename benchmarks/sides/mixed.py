"""Ten rounds of one device in a fleet of mixed depth, as the demo's tuner chose them: python -m
benchmarks.sides.mixed WORK HOME THREADS.

Depth moves between one and three layers; what lies between the floor and the device's boundary is frozen
there and comes anew every second round. Where to cut is the engine's own choice. Prints one JSON line;
making states anew is part of the time.
"""

import json
import sys
import time
from pathlib import Path
from typing import Any

from rankfleet.edge_agent.worker.__main__ import environment

DEPTHS = (3, 2, 1, 2, 3, 2, 3, 2, 3, 2)
EXAMPLES, STEPS, MAX_DEPTH, FRESH = 320, 12, 3, 2


def main() -> None:
    """Run."""
    environment()
    import torch

    from rankfleet.edge_agent.model import Base
    from rankfleet.edge_agent.model.cache.activations import example_key
    from rankfleet.edge_agent.model.cache.prefix import choose
    from rankfleet.profiles.card import read_card

    from . import work as works
    from .ours import adapter, trainer_of

    name, home, threads = sys.argv[1:]
    torch.set_num_threads(int(threads))
    work = works.make(name, Path(home), EXAMPLES // works.BATCH[name])
    folder = Path(work.folder)
    card = read_card(folder)
    base = Base(folder, [], 32, {}, work.causal, digest=card.digest)
    for e in work.examples:
        e["key"] = example_key(e["ids"])
    floor, tokens, cuts, made, seconds = card.layers - MAX_DEPTH, 0, [], 0, 0.0
    for number, depth in enumerate(DEPTHS):
        spec, tensors = adapter(base, card, work, card.layers - depth)
        below, frozen = adapter(base, card, work, floor)
        start = time.perf_counter()
        base.place(spec, tensors)
        for n, pair in below.pairs.items():
            if n not in spec.pairs:
                b = torch.full((pair.out, pair.rank), 1e-3 * (number // FRESH))
                base.sites[n].place(torch.from_numpy(frozen[f"{n}.A"]), b, pair.scale, False)
        own = card.layers - depth
        at, _ = choose(
            own, min(own, floor), STEPS * work.batch, len(work.examples), FRESH - number % FRESH, len(DEPTHS)
        )
        old = base.prefix
        if at:
            base.cache(at, [e["ids"] for e in work.examples], 1e5)
        else:
            base.prefix = None
        cuts.append(at)
        made += base.prefix is not None and base.prefix is not old
        trainer = trainer_of(base, work, spec, STEPS, work.examples, lambda step, loss: None, number + 1)
        batches = list(trainer.batches())
        tokens += sum(int(b["attention_mask"].sum()) for b in batches)
        trainer.run(tensors, {})
        seconds += time.perf_counter() - start
    done: dict[str, Any] = {
        "tokens_per_s": round(tokens / seconds),
        "rounds": len(DEPTHS),
        "caches_made": made,
        "cut_below": cuts,
    }
    print(json.dumps(done))


if __name__ == "__main__":
    main()
