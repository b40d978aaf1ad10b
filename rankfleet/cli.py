"""`rankfleet`: the umbrella over both programs. `edge-agent` is `rankfleet agent`, `coordinator` is `rankfleet coordinator`."""

import importlib
import sys

from .federated.version import VERSION

PROGRAMS = {
    "agent": ("edge_agent.cli", "the service on a device (also: edge-agent)"),
    "coordinator": ("coordinator.cli", "the service that plans and runs jobs, and its verbs (also: coordinator)"),
}


def usage() -> str:
    """What there is, in a few lines."""
    rows = [f"  rankfleet {name:12} {text}" for name, (_, text) in PROGRAMS.items()]
    rows += ["  rankfleet --version", "", "`rankfleet agent --help` lists the verbs of a program."]
    return "\n".join(["Tunes one language model on many small machines without moving their data.", "", *rows])


def main(words: list[str] | None = None) -> int:
    """Entry point: hands the words on to the program that the first one names."""
    words = sys.argv[1:] if words is None else words
    if words[:1] == ["--version"]:
        print(f"rankfleet {VERSION}")
        return 0
    if not words or words[0] in ("-h", "--help", "help"):
        print(usage())
        return 0
    if words[0] not in PROGRAMS:
        print(f"error: rankfleet has no program `{words[0][:40]}`\n\n{usage()}", file=sys.stderr)
        return 2
    module = importlib.import_module(f".{PROGRAMS[words[0]][0]}", __package__)
    code: int = module.main(words[1:])
    return code


if __name__ == "__main__":
    sys.exit(main())
