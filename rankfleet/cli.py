"""`rankfleet`: both programs under one name, `agent …` and `coordinator …`; `new …` begins a method."""

import argparse
import importlib
from collections.abc import Sequence

from rankfleet import __version__

PROGRAMS = {
    "agent": "rankfleet.edge_agent.cli",
    "coordinator": "rankfleet.coordinator.cli",
    "new": "rankfleet.new",
}


def build() -> argparse.ArgumentParser:
    """The parser of the first word; the rest belongs to the program that it names."""
    parse = argparse.ArgumentParser(
        prog="rankfleet",
        description="Tunes one language model on many small machines without moving their data.",
        epilog="`rankfleet agent --help` and `rankfleet coordinator --help` list the verbs; "
        "`edge-agent` and `coordinator` are short for them.",
    )
    parse.add_argument("--version", action="version", version=f"rankfleet {__version__}")
    parse.add_argument(
        "program",
        choices=PROGRAMS,
        help="the service on a device, the one that plans jobs, or a new method",
    )
    parse.add_argument(
        "words", nargs=argparse.REMAINDER, metavar="…", help="a verb of that program, and its options"
    )
    return parse


def main(argv: Sequence[str] | None = None) -> int:
    """Hand the words after the program's name to that program; its exit status."""
    args = build().parse_args(argv)
    status: int = importlib.import_module(PROGRAMS[args.program]).main(args.words)
    return status
