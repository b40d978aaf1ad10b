"""Real text that every machine has: paragraphs of the documentation strings of Python's standard library,
by subject area.

The list of modules is fixed. Paragraphs come from the sources with `ast`, nothing is imported. Exact
duplicates are dropped before the split. The test set is made of whole modules that no device ever sees.
"""

import ast
import hashlib
import json
import random
import re
import sysconfig
from pathlib import Path

AREAS: dict[str, list[str]] = {
    "async": ["asyncio", "selectors", "asyncore", "asynchat", "concurrent"],
    "text": [
        "string",
        "textwrap",
        "difflib",
        "re",
        "unicodedata",
        "codecs",
        "encodings",
        "gettext",
        "locale",
        "stringprep",
        "pprint",
        "reprlib",
        "shlex",
        "cmd",
        "optparse",
        "argparse",
        "getopt",
    ],
    "numbers": [
        "statistics",
        "fractions",
        "decimal",
        "_pydecimal",
        "numbers",
        "random",
        "colorsys",
        "heapq",
        "bisect",
        "datetime",
        "_strptime",
        "calendar",
        "_pydatetime",
        "graphlib",
    ],
    "files": [
        "pathlib",
        "shutil",
        "tempfile",
        "glob",
        "fnmatch",
        "os",
        "posixpath",
        "ntpath",
        "genericpath",
        "filecmp",
        "fileinput",
        "zipfile",
        "tarfile",
        "gzip",
        "bz2",
        "lzma",
        "zipapp",
        "_pyio",
        "io",
        "stat",
        "linecache",
        "mimetypes",
    ],
    "network": [
        "socket",
        "socketserver",
        "http",
        "urllib",
        "ftplib",
        "smtplib",
        "imaplib",
        "poplib",
        "telnetlib",
        "nntplib",
        "ssl",
        "ipaddress",
        "xmlrpc",
        "wsgiref",
        "webbrowser",
        "cgi",
        "uuid",
        "netrc",
    ],
    "mail": ["email", "mailbox", "mailcap", "quopri", "base64", "uu", "smtpd"],
    "markup": ["html", "xml", "json", "csv", "plistlib", "configparser", "tomllib", "_markupbase"],
    "code": [
        "ast",
        "dis",
        "inspect",
        "tokenize",
        "token",
        "symtable",
        "py_compile",
        "compileall",
        "pyclbr",
        "importlib",
        "zipimport",
        "pkgutil",
        "modulefinder",
        "runpy",
        "code",
        "codeop",
        "opcode",
        "keyword",
        "tabnanny",
        "imp",
    ],
    "debugging": [
        "unittest",
        "doctest",
        "pdb",
        "bdb",
        "trace",
        "traceback",
        "profile",
        "cProfile",
        "pstats",
        "timeit",
        "logging",
        "warnings",
        "faulthandler",
        "tracemalloc",
        "pydoc",
        "cgitb",
    ],
    "processes": [
        "subprocess",
        "threading",
        "multiprocessing",
        "queue",
        "sched",
        "signal",
        "contextlib",
        "contextvars",
        "pty",
        "shelve",
        "dbm",
        "sqlite3",
        "pickle",
        "pickletools",
        "copyreg",
    ],
}
TEST_MODULES = {
    "asyncio.tasks",
    "asyncio.streams",
    "asyncio.queues",
    "asyncio.subprocess",
    "asyncio.locks",
    "selectors",
    "textwrap",
    "optparse",
    "codecs",
    "gettext",
    "statistics",
    "calendar",
    "heapq",
    "shutil",
    "tarfile",
    "tempfile",
    "gzip",
    "socket",
    "http.cookiejar",
    "http.cookies",
    "smtplib",
    "imaplib",
    "email.message",
    "email.headerregistry",
    "email.generator",
    "html.parser",
    "xml.dom.minidom",
    "xml.sax.handler",
    "xml.sax.xmlreader",
    "configparser",
    "csv",
    "inspect",
    "modulefinder",
    "pkgutil",
    "importlib.util",
    "unittest.mock",
    "pdb",
    "traceback",
    "logging.handlers",
    "warnings",
    "threading",
    "multiprocessing.managers",
    "pickle",
    "queue",
    "email.utils",
    "email.header",
    "plistlib",
    "contextlib",
}
TRAIN = 4000
TEST = 1200
LABELS = sorted(AREAS)
_MARKUP = re.compile(r"^(>>>|\.\.\.|:|@|\s*[-=~*]{3})")


def paragraphs(file: Path) -> list[str]:
    """Prose paragraphs of all docstrings of a module, whitespace folded; code examples and rulers are left
    out."""
    try:
        tree = ast.parse(file.read_text(encoding="utf-8"))
    except (SyntaxError, UnicodeDecodeError, ValueError):
        return []
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            for part in re.split(r"\n\s*\n", ast.get_docstring(node) or ""):
                text = " ".join(part.split())
                if 5 <= len(text.split()) <= 200 and not _MARKUP.match(part):
                    found.append(text)
    return found


def collect() -> list[dict[str, str]]:
    """Every paragraph of every area once: rows with `text`, `label` and `module`."""
    library = Path(sysconfig.get_paths()["stdlib"])
    rows: list[dict[str, str]] = []
    seen: set[str] = set()
    for label, names in AREAS.items():
        for file in (f for name in names for f in sources(library, name)):
            module = ".".join(file.relative_to(library).with_suffix("").parts).removesuffix(".__init__")
            for text in paragraphs(file):
                if text not in seen:
                    seen.add(text)
                    rows.append({"text": text, "label": label, "module": module})
    return rows


def sources(library: Path, name: str) -> list[Path]:
    """The files of a module or package; none where this Python no longer has it."""
    one, many = library / f"{name}.py", library / name
    if one.exists():
        return [one]
    return sorted(p for p in many.rglob("*.py") if not {"test", "tests"} & set(p.parts))


def build() -> tuple[list[dict[str, str]], list[dict[str, str]], str]:
    """(train, test, SHA-256 over both)."""
    rows = collect()
    test = [r for r in rows if r["module"] in TEST_MODULES]
    train = [r for r in rows if r["module"] not in TEST_MODULES]
    rng = random.Random(7)
    train, test = _sample(train, TRAIN, rng), _sample(test, TEST, rng)
    digest = hashlib.sha256(json.dumps([train, test], sort_keys=True).encode()).hexdigest()
    return train, test, digest


def _sample(rows: list[dict[str, str]], count: int, rng: random.Random) -> list[dict[str, str]]:
    """At most `count` rows, no area with more than a quarter of them."""
    rows = sorted(rows, key=lambda r: (r["label"], r["module"], r["text"]))
    rng.shuffle(rows)
    held: dict[str, int] = {}
    kept = []
    for r in rows:
        if held.get(r["label"], 0) < count // 4 and len(kept) < count:
            held[r["label"]] = held.get(r["label"], 0) + 1
            kept.append(r)
    return kept


def shards(
    train: list[dict[str, str]], devices: list[str], shares: list[float], skew: float = 0.5
) -> dict[str, list[dict[str, str]]]:
    """A non-IID shard for every device: areas drawn from a Dirichlet with concentration `skew`, at least 6
    areas everywhere."""
    rng = random.Random(11)
    found: dict[str, list[dict[str, str]]] = {d: [] for d in devices}
    for label in sorted({r["label"] for r in train}):
        rows = [r for r in train if r["label"] == label]
        draws = [share * rng.gammavariate(skew, 1.0) / skew for share in shares]
        total = sum(draws)
        at = 0
        for n, device in enumerate(devices):
            end = len(rows) if n == len(devices) - 1 else at + round(len(rows) * draws[n] / total)
            found[device] += rows[at:end]
            at = end
    _at_least(found, 6)
    return found


def _at_least(found: dict[str, list[dict[str, str]]], areas: int) -> None:
    """Move a handful of rows from the richest device to those with too few areas."""
    for rows in found.values():
        for label in sorted({r["label"] for other in found.values() for r in other}):
            have = {r["label"] for r in rows}
            if len(have) >= areas:
                break
            if label not in have:
                giver = max(
                    (o for o in found.values() if o is not rows),
                    key=lambda o: sum(r["label"] == label for r in o),
                )
                moved = [r for r in giver if r["label"] == label][:12]
                rows += moved
                for r in moved:
                    giver.remove(r)
