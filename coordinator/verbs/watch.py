"""`coordinator watch`: a job as a table that is drawn again as it moves, and its closed rounds into sinks."""

import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

from rankfleet.federated.errors import RankfleetError, Unreachable
from rankfleet.federated.program.cli import table
from rankfleet.federated.wire.states import ENDED

from .client import Client
from .sinks import Figures, Sink, figures

ROWS = 12


def screen(
    job: str, state: str, rounds: Sequence[Figures], open_rows: Sequence[dict[str, Any]], live: dict[str, Any]
) -> str:
    """What is shown: the last rounds, then what every device does now."""
    shown = [
        {
            "round": f.round,
            "arrived": f"{f.arrived}/{f.invited}",
            "seconds": f.seconds,
            "loss": _digits(f.train_loss),
            "held_out_loss": _digits(f.held_out_loss),
            "accuracy": _digits(f.held_out_accuracy),
        }
        for f in rounds[-ROWS:]
    ]
    devices = [
        {
            "device": d["device"],
            "state": d["state"],
            "now": _now(live.get(d["device"], {})),
            "arm": d["arm"].get("placement", ""),
        }
        for row in open_rows
        for d in row["devices"]
    ]
    closed = table(shown) if shown else "no round has closed yet"
    text = f"{job}: {state}, {len(rounds)} rounds closed\n\n{closed}"
    if devices:
        text += f"\n\nround {open_rows[-1]['round']}\n{table(devices[:40])}" + (
            f"\n… and {len(devices) - 40} more" if len(devices) > 40 else ""
        )
    return text


def _digits(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"


def _now(live: dict[str, Any]) -> str:
    chunks = live.get("chunks")
    return (
        f"sending {chunks[0]}/{chunks[1]}"
        if live.get("state") == "sending" and chunks
        else str(live.get("state", ""))
    )


def follow(
    client: Client,
    job: str,
    sinks: Sequence[Sink],
    *,
    once: bool = False,
    every_s: float = 1.0,
    say: Callable[[str], None] | None = None,
) -> str:
    """Until the job has ended; returns its state. The service may come and go meanwhile. Raises
    RankfleetError for an unknown job."""
    say = say or _painter()
    told, state = -1, "queued"
    try:
        while True:
            try:
                state = next((r["state"] for r in client.get("/jobs") if r["job"] == job), "")
                answer = client.get(f"/jobs/{job}/rounds")
            except Unreachable:
                if once:
                    raise
                say(f"{job}: the coordinator does not answer; waiting")
                time.sleep(5 * every_s)
                continue
            closed = [figures(r) for r in answer["rounds"] if r["state"] == "closed"]
            for row in closed:
                if row.round > told:
                    told = row.round
                    for sink in sinks:
                        _add(sink, job, row)
            say(
                screen(
                    job,
                    state,
                    closed,
                    [r for r in answer["rounds"] if r["state"] != "closed"][-1:],
                    answer["live"],
                )
            )
            if once or state in ENDED:
                return state
            time.sleep(every_s)
    finally:
        for sink in sinks:
            sink.close()


def _add(sink: Sink, job: str, row: Figures) -> None:
    """A sink that fails is said, and ends nothing."""
    try:
        sink.add(job, row)
    except RankfleetError:
        raise
    except Exception as error:
        print(f"{type(sink).__name__}: round {row.round} was not written: {error}", file=sys.stderr)


def _painter() -> Callable[[str], None]:
    """Draws over the last picture on a terminal; elsewhere prints what is new."""
    last = [""]

    def paint(text: str) -> None:
        if text == last[0]:
            return
        if sys.stdout.isatty():
            print(f"\x1b[H\x1b[2J{text}", flush=True)
        else:
            print(text if not last[0] else text.split("\n\n")[1].splitlines()[-1], flush=True)
        last[0] = text

    return paint
