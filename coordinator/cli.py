"""`coordinator`: the service, and one verb for everything that an operator asks of it (`coordinator
--help`)."""

import argparse
import os
import sys
from pathlib import Path

from rankfleet.federated.program import cli

from .verbs import fleet, jobs, results, service

DEFAULT = "/etc/rankfleet/coordinator.yaml"


def build() -> argparse.ArgumentParser:
    """The parser."""
    parse = cli.parser(
        "coordinator", "Plans and runs federated fine-tuning jobs over a fleet of small devices."
    )
    group = parse.add_subparsers(dest="verb", required=True, metavar="VERB")

    def verb(name: str, run: cli.Command, text: str, example: str, *words: str) -> argparse.ArgumentParser:
        made = cli.command(group, name, run, text, example)
        made.add_argument(
            "--config", type=Path, default=Path(DEFAULT), help=f"the coordinator's YAML (default {DEFAULT})"
        )
        made.add_argument(
            "--key",
            type=Path,
            default=os.environ.get("RANKFLEET_KEY"),
            help="the operator's key (default: $RANKFLEET_KEY)",
        )
        for word in words:
            made.add_argument(word)
        return made

    for part in (service, jobs, results, fleet):
        part.add(verb)
    return parse


def main(words: list[str] | None = None) -> int:
    """Entry point."""
    return cli.main(build(), words)


if __name__ == "__main__":
    sys.exit(main())
