"""YAML into frozen structs, through one door.

YAML 1.2 numbers (`1e-3` is a float), duplicate keys and aliases refused, floats finite, at most 1 MB.
An error names the file, the line and, for an unknown key, the nearest known one.
"""

import difflib
import math
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, TypeVar, get_args

import msgspec
import yaml

from ..errors import ConfigError

T = TypeVar("T")
LIMIT = 1_000_000

_NULL = {"", "~", "null", "Null", "NULL"}
_BOOL = {"true": True, "True": True, "TRUE": True, "false": False, "False": False, "FALSE": False}
_INT = re.compile(r"[-+]?[0-9]+\Z|0o[0-7]+\Z|0x[0-9a-fA-F]+\Z")
_FLOAT = re.compile(
    r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?\Z|[-+]?\.(inf|Inf|INF)\Z|\.(nan|NaN|NAN)\Z"
)
_UNKNOWN = re.compile(r"unknown field `([^`]*)`")
_WHERE = re.compile(r"at `(?:key in )?\$([^`]*)`")
Path_ = tuple[str | int, ...]


class _Composer(yaml.SafeLoader):
    """Composes nodes only; aliases, which can blow a small file up to gigabytes, are refused."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            event: Any = self.peek_event()  # type: ignore[no-untyped-call]
            raise ConfigError(
                f"line {event.start_mark.line + 1}: aliases (`*{event.anchor}`) are not allowed",
                "write the value out",
            )
        return super().compose_node(parent, index)


def parse(text: str, name: str = "text") -> tuple[Any, dict[Path_, int]]:
    """Plain data and the line of every path in it."""
    if len(text) > LIMIT:
        raise ConfigError(f"{name}: {len(text):,} bytes, at most {LIMIT:,} are read")
    lines: dict[Path_, int] = {}
    try:
        node = _Composer(text).get_single_node()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        raise ConfigError(f"{name}, line {mark.line + 1 if mark else '?'}: {error.problem}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{name}: {error}") from None
    except ConfigError as error:
        raise ConfigError(f"{name}, {error.args[0]}", error.hint) from None
    except RecursionError:
        raise ConfigError(f"{name}: nested too deeply") from None
    return (None if node is None else _data(node, (), lines, name)), lines


def _data(node: Any, path: Path_, lines: dict[Path_, int], name: str) -> Any:
    line = node.start_mark.line + 1
    lines[path] = line
    if isinstance(node, yaml.ScalarNode):
        return _scalar(node, f"{name}, line {line}")
    if isinstance(node, yaml.SequenceNode):
        return [_data(item, (*path, i), lines, name) for i, item in enumerate(node.value)]
    out: dict[Any, Any] = {}
    for key_node, value in node.value:
        key = _scalar(key_node, f"{name}, line {line}") if isinstance(key_node, yaml.ScalarNode) else None
        if not isinstance(key, str | int | float) or isinstance(key, bool):
            raise ConfigError(
                f"{name}, line {key_node.start_mark.line + 1}: a key must be a word or a number"
            )
        if key in out:
            raise ConfigError(
                f"{name}, line {key_node.start_mark.line + 1}: `{key}` is set twice", "keep one of them"
            )
        here = (*path, str(key))
        out[key] = _data(value, here, lines, name)
        lines[here] = key_node.start_mark.line + 1
    return out


def _scalar(node: Any, where: str) -> Any:
    text: str = node.value
    if node.style in ("'", '"', "|", ">"):
        return text
    if text in _NULL:
        return None
    if text in _BOOL:
        return _BOOL[text]
    if len(text) > 300 and (_INT.match(text) or _FLOAT.match(text)):
        raise ConfigError(f"{where}: a number of {len(text)} digits")
    if _INT.match(text):
        return int(text, 0) if text[:2] in ("0o", "0x") else int(text)
    if _FLOAT.match(text):
        number = float(
            text.replace(".inf", "inf")
            .replace(".nan", "nan")
            .replace(".Inf", "inf")
            .replace(".NaN", "nan")
            .replace(".INF", "inf")
            .replace(".NAN", "nan")
        )
        if not math.isfinite(number):
            raise ConfigError(f"{where}: `{text}` is not a finite number")
        return number
    return text


def convert(data: Any, kind: type[T], lines: dict[Path_, int], name: str = "text", at: Path_ = ()) -> T:
    """`data` as `kind`. `at` is where `data` stands in the file, for the line in an error."""
    try:
        return msgspec.convert(data, kind, strict=True)
    except msgspec.ValidationError as error:
        raise _explain(str(error), kind, lines, name, at) from None


def _explain(message: str, kind: Any, lines: dict[Path_, int], name: str, at: Path_) -> ConfigError:
    found = _WHERE.search(message)
    path = (*at, *_path(found.group(1) if found else ""))
    hint = ""
    if unknown := _UNKNOWN.search(message):
        path = (*path, unknown.group(1))
        near = difflib.get_close_matches(unknown.group(1), sorted(_fields(kind)), n=1)
        message = f"unknown key `{unknown.group(1)}`"
        hint = f"did you mean `{near[0]}`?" if near else ""
    else:
        message = _WHERE.sub("", message).rstrip(" -")
    while path and path not in lines:
        path = path[:-1]
    where = ".".join(str(p) for p in path)
    return ConfigError(
        f"{name}, line {lines.get(path, 1)}{f' (`{where}`)' if where else ''}: {message}", hint
    )


def _path(text: str) -> Iterable[str | int]:
    for word, index in re.findall(r"\.([^.\[\]]+)|\[(\d+|\.\.\.)\]", text):
        yield word if word else (int(index) if index.isdigit() else index)


def _fields(kind: Any, seen: set[Any] | None = None) -> set[str]:
    """Names of the fields of a struct and of all structs below it."""
    seen = set() if seen is None else seen
    if kind in seen:
        return set()
    seen.add(kind)
    names: set[str] = set()
    if isinstance(kind, type) and issubclass(kind, msgspec.Struct):
        for field in msgspec.structs.fields(kind):
            names |= {field.encode_name} | _fields(field.type, seen)
    for inner in get_args(kind):
        if isinstance(inner, type) or get_args(inner):
            names |= _fields(inner, seen)
    return names


def load(path: Path, kind: type[T]) -> T:
    """The YAML file `path` as `kind`. Raises ConfigError."""
    return loads(read(path), kind, str(path))


def loads(text: str, kind: type[T], name: str = "text") -> T:
    """The YAML `text` as `kind`. Raises ConfigError."""
    data, lines = parse(text, name)
    return convert({} if data is None else data, kind, lines, name)


def read(path: Path) -> str:
    """The text of a configuration file. Raises ConfigError."""
    try:
        if path.stat().st_size > LIMIT:
            raise ConfigError(f"{path}: {path.stat().st_size:,} bytes, at most {LIMIT:,} are read")
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}", "check the path and its permissions") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{path}: not UTF-8 text") from None
