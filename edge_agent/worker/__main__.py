"""The training process: `python -m rankfleet.edge_agent.worker`. Reads orders as JSON lines, answers with
JSON lines.

It lives as long as the job, so that base and examples stay loaded; when standard input ends, it ends. A
failure is an answer, with a code that the planner understands: `memory`, `data`, `job` or `crash`.
"""

import os
import signal
import sys
import threading
import traceback
from typing import IO, Any

import msgspec

from ..machine import system
from ..order import Order


def main(make: Any = None) -> None:
    """Serve orders until standard input ends. `make` builds another worker than the training one
    (benchmarks)."""
    system.die_with_parent()
    system.low_priority()
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    environment()
    orders = _reader(sys.stdin)
    from .resume import Halted
    from .worker import Worker

    worker = (make or Worker)()
    busy = _leave_when_told()
    say(answers, {"event": "ready", "rss_mb": system.peak_rss_mb()})
    while True:
        if (line := orders(worker.idle_in())) is None:
            _quietly(worker.idle)
            continue
        try:
            busy.set()
            worker.run(
                msgspec.json.decode(line, type=Order),
                lambda told: say(answers, {"event": "progress", **told}),
            )
            say(answers, {"event": "done"})
        except Halted as halted:
            say(answers, {"event": "failed", "code": "halted", "reason": str(halted)})
            return
        except Exception as error:
            say(answers, {"event": "failed", **_reason(error)})
        finally:
            busy.clear()
        if system.halted():
            return


def environment() -> None:
    """What libraries read when they are loaded, where it is not set already; and how memory is given back."""
    system.steady_memory()
    # Threads wait awake for a moment, then sleep: asleep at once costs a third of a small step, awake takes
    # cores from others.
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    os.environ.setdefault("KMP_BLOCKTIME", "1")
    # Kernels are made for each number of rows. Keeping the last few takes 50 to 100 MB less than all; bf16
    # ones are slow to make (6%).
    os.environ.setdefault("LRU_CACHE_CAPACITY", "16")
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "32")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")


def _leave_when_told() -> threading.Event:
    """SIGTERM ends a worker without work at once, another after its step. The event says that it has work."""
    busy = threading.Event()

    def told(number: int, frame: Any) -> None:
        system.halt()
        if not busy.is_set():
            os._exit(0)

    signal.signal(signal.SIGTERM, told)
    return busy


def _quietly(work: Any) -> None:
    """What must not end the worker if it fails."""
    try:
        work()
    except Exception as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)


def _reason(error: Exception) -> dict[str, str]:
    from rankfleet.federated.errors import DoesNotFit, RankfleetError, Refused

    if (
        isinstance(error, DoesNotFit | MemoryError)
        or "not enough memory" in str(error)
        or "out of memory" in str(error)
    ):
        return {"code": "memory", "reason": str(error)}
    if isinstance(error, Refused):
        return {"code": "data", "reason": str(error)}
    if isinstance(error, RankfleetError):
        return {"code": "job", "reason": str(error)}
    print(traceback.format_exc(), file=sys.stderr)
    return {"code": "crash", "reason": f"{type(error).__name__}: {error}"}


def say(answers: IO[str], what: dict[str, Any]) -> None:
    """One line to the service."""
    answers.write(msgspec.json.encode(what).decode() + "\n")


def _reader(stream: IO[str]) -> Any:
    """Lines through a thread, so that the end of the stream ends the process even in the middle of a step."""
    import queue

    lines: queue.Queue[str] = queue.Queue()

    def read() -> None:
        for line in stream:
            lines.put(line)
        os._exit(0)

    threading.Thread(target=read, name="orders", daemon=True).start()

    def get(wait_s: float | None) -> str | None:
        """The next line; None after `wait_s` without one."""
        try:
            return lines.get(timeout=wait_s)
        except queue.Empty:
            return None

    return get


if __name__ == "__main__":
    main()
