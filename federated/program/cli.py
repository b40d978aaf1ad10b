"""What both command lines share: printing for people or as JSON, errors as one line, help with an example."""

import argparse
import json
import sys
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from ..errors import RankfleetError

Command = Callable[[argparse.Namespace], int]


def parser(name: str, text: str) -> argparse.ArgumentParser:
    """The program's parser."""
    return argparse.ArgumentParser(
        prog=name, description=text, formatter_class=argparse.RawDescriptionHelpFormatter
    )


def command(group: Any, name: str, run: Command, text: str, example: str) -> argparse.ArgumentParser:
    """One verb: its help shows an example, and everything that prints takes `--json`."""
    made: argparse.ArgumentParser = group.add_parser(
        name,
        help=text,
        description=text,
        epilog=f"example:\n  {example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    made.add_argument("--json", action="store_true", help="print JSON")
    made.set_defaults(run=run)
    return made


def show(args: argparse.Namespace, data: Any, text: str | None = None) -> None:
    """`data` as JSON with `--json`, else `text` or a table."""
    if args.json:
        print(json.dumps(data, indent=1, default=str))
    elif text is not None:
        print(text)
    elif isinstance(data, list):
        print(table(data))
    else:
        print("\n".join(f"{k:16} {_cell(v)}" for k, v in data.items()))


def table(rows: Iterable[Mapping[str, Any]]) -> str:
    """Rows under their keys, columns as wide as needed."""
    found = [{k: _cell(v) for k, v in row.items()} for row in rows]
    if not found:
        return "nothing to show"
    keys = list(found[0])
    width = {k: max(len(k), *(len(r.get(k, "")) for r in found)) for k in keys}
    lines = ["  ".join(k.upper().ljust(width[k]) for k in keys)]
    lines += ["  ".join(r.get(k, "").ljust(width[k]) for k in keys) for r in found]
    return "\n".join(line.rstrip() for line in lines)


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, list | tuple):
        return ", ".join(map(str, value))
    return str(value)


Finding = dict[str, str]
"""One line of a `doctor`: what was looked at, `ok`, `warning` or `error`, what was found, and what to do."""


def finding(check: str, state: str, text: str, todo: str = "") -> Finding:
    """See `Finding`."""
    return {"check": check, "state": state, "text": text, "do": todo}


def main(parse: argparse.ArgumentParser, words: list[str] | None = None) -> int:
    """Run the chosen verb; an error is one message on standard error and exit code 1."""
    args = parse.parse_args(words)
    try:
        code: int = args.run(args)
        return code
    except RankfleetError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except BrokenPipeError:
        return 0
    except KeyboardInterrupt:
        return 130
