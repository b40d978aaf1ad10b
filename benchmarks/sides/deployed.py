"""An exported encoder in a process of its own: python -m benchmarks.sides.deployed FOLDER TEXTS.jsonl
THREADS.

Prints one JSON line: milliseconds of one text after the other (p50, p95), tokens a second in batches,
accuracy, memory.
"""

import json
import statistics
import sys
import time
from pathlib import Path

SINGLE, BATCH = 200, 16


def main() -> None:
    """Run."""
    import onnxruntime
    import psutil

    import rankfleet.edge_agent.infer as infer
    from rankfleet.edge_agent.config import AgentConfig

    folder, texts, threads = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
    plain = onnxruntime.SessionOptions

    def options() -> onnxruntime.SessionOptions:
        made = plain()
        made.intra_op_num_threads = threads
        return made

    onnxruntime.SessionOptions = options
    rows = [json.loads(line) for line in texts.read_text(encoding="utf-8").splitlines()]
    before = psutil.Process().memory_info().rss / 1e6
    model = infer.runtime(AgentConfig(), folder)
    assert isinstance(model, infer.OnnxRuntime)
    ids = model.tokens.ids([r["text"] for r in rows], model.task.max_length)
    for i in ids[:20]:
        model.scores([i])
    singles = []
    for i in ids[:SINGLE]:
        start = time.perf_counter()
        model.scores([i])
        singles.append(1e3 * (time.perf_counter() - start))
    order = sorted(range(len(ids)), key=lambda n: len(ids[n]))
    right, start = 0, time.perf_counter()
    for at in range(0, len(order), BATCH):
        picked = order[at : at + BATCH]
        scores = model.scores([ids[n] for n in picked])
        right += sum(int(s.argmax()) == rows[n]["label"] for n, s in zip(picked, scores, strict=True))
    seconds = time.perf_counter() - start
    cuts = statistics.quantiles(singles, n=20)
    print(json.dumps({
        "p50_ms": cuts[9], "p95_ms": cuts[18], "tokens_per_s": sum(map(len, ids)) / seconds,
        "accuracy": 100 * right / len(rows),
        "peak_mb": psutil.Process().memory_info().rss / 1e6 - before,
    }))  # fmt: skip


if __name__ == "__main__":
    main()
