"""The file system is the registry: `federated/methods/<family>/<name>.py` is the method `<name>`.

Looking a name up imports one file; listing imports none, it reads sources. Third parties add methods
through the entry-point group `rankfleet.methods` (`name = "package.module"`), never through a job: jobs
arrive over a network.
"""

import ast
import difflib
import importlib
import importlib.metadata
from functools import cache
from pathlib import Path
from typing import Any

import msgspec

from ..errors import ConfigError, UnknownMethod
from .method import HOOKS, Method

ROOT = Path(__file__).parent.parent / "methods"
PACKAGE = f"{__package__.rpartition('.')[0]}.methods"
ORDER = ("direction reproduced", "toy-checked", "reconstructed", "simulation only")


class Entry(msgspec.Struct, frozen=True):
    """One row of `coordinator methods`."""

    name: str
    family: str
    summary: str
    space: str
    evidence: str
    use_when: str
    hooks: tuple[str, ...]


@cache
def modules() -> dict[str, str]:
    """Method name → import path."""
    found: dict[str, str] = {}
    for path in sorted(ROOT.glob("*/*.py")):
        if not path.stem.startswith("_"):
            if path.stem in found:
                raise RuntimeError(f"two methods are named `{path.stem}`: {found[path.stem]}, {path}")
            found[path.stem] = f"{PACKAGE}.{path.parent.name}.{path.stem}"
    for point in importlib.metadata.entry_points(group="rankfleet.methods"):
        found.setdefault(point.name, point.value)
    return found


@cache
def method_class(name: str) -> type[Method]:
    """The class behind a name. Raises UnknownMethod."""
    if name not in modules():
        near = difflib.get_close_matches(name, modules(), n=1)
        hint = f"did you mean `{near[0]}`?" if near else "`coordinator methods` lists them all"
        raise UnknownMethod(f"no method named `{name[:80]}`", hint)
    module = importlib.import_module(modules()[name])
    classes = [
        v
        for v in vars(module).values()
        if isinstance(v, type) and issubclass(v, Method) and v.__module__ == module.__name__
    ]
    if len(classes) != 1:
        raise RuntimeError(f"{module.__name__} defines {len(classes)} methods; one file is one method")
    return classes[0]


def build(name: str, settings: dict[str, Any] | None = None) -> Method:
    """The method `name` with its settings. Raises UnknownMethod or ConfigError."""
    kind = method_class(name)
    try:
        return msgspec.convert(settings or {}, kind)
    except msgspec.ValidationError as error:
        fields = ", ".join(f.name for f in msgspec.structs.fields(kind)) or "none"
        raise ConfigError(f"method `{name}`: {error}", f"its settings are: {fields}") from None


StackItem = str | dict[str, dict[str, Any] | None]


def build_stack(items: list[StackItem]) -> dict[str, Method]:
    """Methods of a job's `stack`, in order: `name` or `{name: {setting: value}}`. Raises ConfigError."""
    found: dict[str, Method] = {}
    for item in items:
        if isinstance(item, dict) and len(item) != 1:
            raise ConfigError(
                f"a stack entry names one method, this one names {len(item)}: {sorted(item)}",
                "write each method as an entry of its own, with a dash before it",
            )
        name, settings = (item, None) if isinstance(item, str) else next(iter(item.items()))
        if name in found:
            raise ConfigError(f"the stack names `{name}` twice", "keep one of them")
        found[name] = build(name, settings)
    return found


def entries() -> list[Entry]:
    """The whole catalogue, best evidence first. Reads sources of our own methods without importing them."""
    rows = [_entry(name, path) for name, path in modules().items()]
    return sorted(
        rows, key=lambda e: (ORDER.index(e.evidence) if e.evidence in ORDER else len(ORDER), e.name)
    )


def _entry(name: str, path: str) -> Entry:
    file = ROOT / (path.removeprefix(f"{PACKAGE}.").replace(".", "/") + ".py")
    if not file.exists():
        kind = method_class(name)
        doc = (importlib.import_module(path).__doc__ or "").strip().partition("\n")[0]
        hooks = tuple(h for h in HOOKS if getattr(kind, h) is not getattr(Method, h))
        return Entry(name, path.partition(".")[0], doc, kind.space, kind.evidence, kind.use_when, hooks)
    tree = ast.parse(file.read_text(encoding="utf-8"))
    body = next(node for node in tree.body if isinstance(node, ast.ClassDef)).body
    said = {
        n.target.id: ast.literal_eval(n.value)
        for n in body
        if isinstance(n, ast.AnnAssign)
        and isinstance(n.target, ast.Name)
        and n.value
        and ast.unparse(n.annotation).startswith("ClassVar")
    }
    hooks = tuple(n.name for n in body if isinstance(n, ast.FunctionDef) and n.name in HOOKS)
    doc = (ast.get_docstring(tree) or "").partition("\n")[0]
    return Entry(
        name,
        file.parent.name,
        doc,
        said.get("space", "any"),
        said.get("evidence", "toy-checked"),
        said.get("use_when", ""),
        hooks,
    )
