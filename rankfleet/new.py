"""`rankfleet new method NAME --family F`: a method's file and its test, which run as they are written.

In a checkout of rankfleet they go to their places; anywhere else a package of its own is begun, whose
method jobs can name once it is installed on coordinator and devices.
"""

import argparse
import keyword
import re
import sys
from pathlib import Path

from .federated.errors import ConfigError, RankfleetError

NAME = re.compile(r"[a-z][a-z0-9]*(_[a-z0-9]+)*\Z")
TAKEN = ("method", "annotated", "class_var", "client_context", "meta", "tensors")
"""Their classes would be called like what every method's file imports."""
METHOD = '''"""{title}: one sentence that says what is new about it (Author, Author, year).

The formula in the paper's own symbols, with its number. What was reconstructed, and how it was checked.
"""

from typing import Annotated, ClassVar

from msgspec import Meta

{imports}


class {title}(Method, frozen=True):
    """`send`: what leaves the device, times `share`."""

    evidence: ClassVar[str] = "reconstructed"
    use_when: ClassVar[str] = "one sentence for somebody who chooses among fifty methods"

    share: Annotated[float, Meta(gt=0, le=1, description="factor of everything that leaves")] = 0.5

    def send(self, delta: Tensors, ctx: ClientContext) -> Tensors:
        """u = share · Δ."""
        return {{name: (tensor * self.share).astype(tensor.dtype) for name, tensor in delta.items()}}
'''
TEST = '''"""{title} with numbers worked by hand."""

from typing import Any

import numpy as np

{imports}


def test_what_leaves_is_a_share_of_what_was_learnt() -> None:
    ctx: Any = None
    delta = {{"layer.A": np.array([[2.0, -4.0]], np.float32)}}
    sent = {title}(share=0.25).send(delta, ctx)
    assert np.array_equal(sent["layer.A"], np.array([[0.5, -1.0]], np.float32))
    assert sent["layer.A"].dtype == np.float32
'''
PROJECT = """[build-system]
requires = ["hatchling"]
build-backend = "hatchling.build"

[project]
name = "rankfleet-{dashed}"
version = "0.1.0"
description = "The federated method {name} for rankfleet."
dependencies = ["rankfleet"]

[project.entry-points."rankfleet.methods"]
{name} = "{name}"

[tool.hatch.build.targets.wheel]
include = ["{name}.py"]
"""


def build() -> argparse.ArgumentParser:
    """The parser."""
    parse = argparse.ArgumentParser(
        prog="rankfleet new", description="Begins something of your own.",
        epilog="example:\n  rankfleet new method fedmine --family objectives",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parse.add_argument("what", choices=["method"], help="what to begin")
    parse.add_argument("name", help="its name in a job's `stack`: lower case, words joined by _")
    parse.add_argument("--family", default="", help="its folder below federated/methods")
    parse.add_argument("--new-family", action="store_true", help="--family is not there yet")
    parse.add_argument(
        "--into", type=Path, default=Path(), help="a checkout, or a package's folder (default: here)"
    )
    return parse


def is_name(word: str) -> bool:
    """May a module and its class be called so?"""
    return bool(NAME.match(word)) and not keyword.iskeyword(word)


def title_of(name: str) -> str:
    """`fed_mine` → `FedMine`. Raises ConfigError for what cannot be a method's name, or is one already."""
    from .federated.contract.catalogue import modules

    if not is_name(name) or name in sys.stdlib_module_names or name in TAKEN:
        raise ConfigError(
            f"`{name[:60]}` cannot be the name of a method",
            "lower case letters and digits, words joined by _; no word of Python or of its library",
        )
    if name in modules():
        raise ConfigError(f"there is a method `{name}` already", "coordinator methods lists them all")
    return "".join(word.capitalize() for word in name.split("_"))


def in_checkout(root: Path, name: str, family: str, new_family: bool) -> dict[Path, str]:
    """Path → text of a method and its test in a checkout. Raises ConfigError for an unknown family."""
    methods, title = root / "federated" / "methods", title_of(name)
    known = sorted(p.name for p in methods.iterdir() if (p / "__init__.py").exists())
    if family not in known and not (new_family and is_name(family)):
        what = f"there is no family `{family[:60]}`" if family else "a method belongs to a family"
        raise ConfigError(what, f"--family {', '.join(known)}; or --new-family with a new name")
    ours = (
        "from ...contract.contexts import ClientContext\nfrom ...contract.method import Method\n"
        "from ...contract.tensors import Tensors"
    )
    files = {
        methods / family / f"{name}.py": METHOD.format(title=title, imports=ours),
        root / "tests" / "methods" / f"test_{name}.py": TEST.format(
            title=title, imports=f"from rankfleet.federated.methods.{family}.{name} import {title}"
        ),
    }
    if family not in known:
        files[methods / family / "__init__.py"] = f'"""Methods: {family}."""\n'
    return files


def alone(folder: Path, name: str) -> dict[Path, str]:
    """Path → text of a package that holds one method."""
    title = title_of(name)
    return {
        folder / f"{name}.py": METHOD.format(
            title=title, imports="from rankfleet import ClientContext, Method, Tensors"
        ),
        folder / f"test_{name}.py": TEST.format(title=title, imports=f"from {name} import {title}"),
        folder / "pyproject.toml": PROJECT.format(name=name, dashed=name.replace("_", "-")),
    }


def write(files: dict[Path, str]) -> None:
    """All of them, or none where one is there already. Raises ConfigError."""
    if there := sorted(str(p) for p in files if p.exists()):
        raise ConfigError(f"{there[0]} exists", "take another name; nothing was written")
    for path, text in files.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        print(path)


def main(words: list[str] | None = None) -> int:
    """Entry point."""
    args = build().parse_args(words)
    try:
        if (args.into / "federated" / "methods").is_dir():
            write(in_checkout(args.into, args.name, args.family, args.new_family))
            print(f"then: pytest tests/methods/test_{args.name}.py; docs/add_a_method.md has every hook")
        else:
            write(alone(args.into, args.name))
            print(f"then: pytest test_{args.name}.py; pip install . on the coordinator and on devices")
        return 0
    except (RankfleetError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
