"""A page for every method and policy, from docstring, class variables, fields and hooks: `make docs`.

`python -m rankfleet.federated.contract.pages docs rankfleet.bandit` writes docs/methods and docs/policies;
with `--check` it says what is out of date and ends with 1. The caller names the package of policies: this
room imports no other. What the base class declares is listed where a class departs from it; nothing is
known by name.
"""

import importlib
import inspect
import pkgutil
import re
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import msgspec

from .catalogue import method_class, modules

RANGE = {"gt": ">", "ge": "≥", "lt": "<", "le": "≤"}
FOOT = "*Made by `make docs` from the code; edit that.*\n"


def base_of(kind: type) -> type:
    """The class that declares the hooks: the last before msgspec's own."""
    return [c for c in kind.__mro__ if c is not object and not c.__module__.startswith("msgspec")][-1]


def policies(package: str) -> dict[str, type]:
    """Name → class of every file below `package` whose class derives from a base of another file."""
    kinds: dict[str, type] = {}
    for info in pkgutil.walk_packages(importlib.import_module(package).__path__, f"{package}."):
        name = info.name.rpartition(".")[2]
        for kind in vars(importlib.import_module(info.name)).values():
            own = inspect.isclass(kind) and kind.__module__ == info.name and issubclass(kind, msgspec.Struct)
            if own and base_of(kind) is not kind and not name.startswith("_"):
                kinds[name] = kind
    return dict(sorted(kinds.items()))


def wrap(text: str, first: str = "") -> str:
    """One paragraph at 100 columns; a line never begins with what Markdown reads as a list."""
    glued, rest = re.sub(r" (?=([-+*#>]|\d+\.) )", "\0", " ".join(text.split())), " " * len(first)
    lines = textwrap.wrap(glued, 100, initial_indent=first, subsequent_indent=rest, break_on_hyphens=False)
    return "\n".join(lines).replace("\0", " ")


def doc_of(thing: Any) -> list[str]:
    """A docstring's paragraphs; indented ones are formulas or examples and stay as they are."""
    parts = re.split(r"\n\s*\n", inspect.cleandoc(thing.__doc__ or ""))
    return [part if part.startswith("    ") else wrap(part) for part in parts if part]


def settings(kind: Any) -> Iterator[str]:
    """One item a field: name, default, range, help."""
    for field in msgspec.structs.fields(kind):
        metas = [m for m in get_args(field.type) if isinstance(m, msgspec.Meta)]
        bounds = [(sign, getattr(m, key)) for m in metas for key, sign in RANGE.items()]
        limits = ", ".join(f"{sign} {bound}" for sign, bound in bounds if bound is not None)
        item = f"`{field.name}`" if field.required else f"`{field.name} = {field.default}`"
        item += f" ({limits})" if limits else ""
        yield wrap(": ".join([item, *(m.description for m in metas if m.description)]), "- ")


def declared(kind: type) -> Iterator[str]:
    """One item for each class variable of the base class that this class sets otherwise."""
    base = base_of(kind)
    for name in (n for n, kind_of in inspect.get_annotations(base).items() if "ClassVar" in str(kind_of)):
        value = getattr(kind, name)
        if name != "use_when" and (value != getattr(base, name, None) or name == "evidence"):
            yield wrap(f"{name}: {'yes' if value is True else value}", "- ")


def hooks(kind: type) -> Iterator[str]:
    """One item for each hook that the class, or a parent of it, defines; its side is the base's word."""
    for name, default in vars(base_of(kind)).items():
        if inspect.isfunction(default) and getattr(kind, name) is not default and not name.startswith("_"):
            side = re.match(r"\[\w+\] ", default.__doc__ or "")
            item = f"`{name}`{f' {side.group().strip()}' if side else ''}"
            yield wrap(": ".join([item, *doc_of(getattr(kind, name))[:1]]), "- ")


def page(name: str, kind: type) -> str:
    """One page of Markdown."""
    file = kind.__module__.removeprefix("rankfleet.").replace(".", "/")
    parts = [f"# {name}", f"`{file}.py`", *doc_of(sys.modules[kind.__module__]), *doc_of(kind)]
    parts += [wrap(f"**Use it when** {when}.") for when in [getattr(kind, "use_when", "")] if when]
    for title, items in (("Settings", settings), ("Declares", declared), ("Hooks", hooks)):
        parts += [f"## {title}\n\n{lines}" for lines in ["\n".join(items(kind))] if lines]
    return "\n\n".join([*parts, FOOT])


def pages(title: str, kinds: dict[str, type]) -> dict[str, str]:
    """File name → text, with a list of all in README.md."""
    first = {name: doc_of(sys.modules[kind.__module__])[:1] for name, kind in kinds.items()}
    rows = (wrap(": ".join([f"[{name}]({name}.md)", *text]), "- ") for name, text in first.items())
    texts = {"README.md": "\n\n".join([f"# {title}", "\n".join(rows), FOOT])}
    return texts | {f"{name}.md": page(name, kind) for name, kind in kinds.items()}


def main(arguments: list[str]) -> None:
    """`TO POLICIES [--check]`; SystemExit after a check. Third parties have pages of their own."""
    to, package, *flags = arguments
    ours = (__package__ or "").partition("federated")[0] + "federated."
    methods = {name: method_class(name) for name, path in sorted(modules().items()) if path.startswith(ours)}
    sets = {"Methods": methods, "Policies": policies(package)}
    texts = {Path(to, t.lower(), n): s for t, kinds in sets.items() for n, s in pages(t, kinds).items()}
    there = {p: p.read_text(encoding="utf-8") for t in sets for p in Path(to, t.lower()).glob("*.md")}
    stale = sorted(p for p in there.keys() | texts if there.get(p) != texts.get(p))
    if "--check" in flags:
        sys.exit("\n".join(f"{path} is out of date; `make docs` writes it anew" for path in stale) or None)
    for path in stale:
        path.write_text(texts[path], encoding="utf-8") if path in texts else path.unlink()


if __name__ == "__main__":
    main(sys.argv[1:])
