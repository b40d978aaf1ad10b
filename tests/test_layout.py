"""The rooms: who may import whom, what may not be imported at start, and what a file may not hold."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
MAY = {
    "federated": set(),
    "profiles": set(),
    "bandit": {"profiles"},
    "coordinator": {"bandit", "profiles", "federated"},
    "edge_agent": {"federated", "profiles"},
}

IDLE = (
    "import rankfleet.edge_agent.service, rankfleet.edge_agent.supervise.process, "
    "rankfleet.edge_agent.trust.identity, rankfleet.federated.transport.mqtt"
)
"""What an agent that waits has loaded."""


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {a.name.removeprefix("rankfleet.").partition(".")[0] for a in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level and node.module:
            words = node.module.split(".")
            found |= {words[1]} if words[0] == "rankfleet" and len(words) > 1 else {words[0]}
    return found


@pytest.mark.parametrize("room", sorted(MAY))
def test_import_arrows(room: str) -> None:
    for path in (ROOT / room).rglob("*.py"):
        ours = imports(path) & (set(MAY) | {"demo", "benchmarks", "tests"})
        assert ours <= MAY[room] | {room}, (
            f"{path.relative_to(ROOT)} imports {sorted(ours - MAY[room] - {room})}"
        )


INSIDE = {
    "federated": {
        "errors": "", "version": "", "contract": "errors", "program": "errors", "tasks": "errors",
        "transport": "errors program", "methods": "contract errors", "peft_format": "contract program tasks",
        "wire": "contract errors program", "trust": "contract errors program transport",
    },
    "bandit": {"arms": "", "policy": "arms", "reward": "policy", "policies": "policy reward",
    "tuner": "arms policies policy"},
    "coordinator": {
        "config": "", "jobs": "", "store": "config", "operators": "config store",
        "fleet": "config jobs store",
        "broker": "config fleet", "exchange": "config fleet store", "planning": "exchange jobs store",
        "aggregate": "exchange store", "export": "config jobs planning store",
        "rounds": "aggregate config exchange jobs planning store",
        "queue": "config exchange jobs operators rounds store",
        "service": "config exchange fleet jobs operators queue store", "health": "service store",
        "web": "health jobs operators service store", "serve": "broker config fleet health service web",
        "verbs": "broker config export fleet jobs operators serve store", "cli": "verbs", "__main__": "cli",
    },
    "edge_agent": {
        "guard_config": "", "support": "", "model": "", "status": "", "tasks": "model",
        "config": "guard_config",
        "order": "config", "supervise": "config guard_config "
                                        "order", "machine": "config model", "trust": "config",
        "exchange": "order status trust", "doctor": "config machine trust",
        "worker": "config machine model order tasks trust", "infer": "config exchange machine model tasks",
        "service": "config exchange order status supervise support trust", "health": "service trust",
        "cli": "config doctor health infer machine service supervise trust", "__main__": "cli",
    },
}  # fmt: skip
"""Room → what is inside it → what of the same room that may import. Written from the ground up: no arrow
runs back."""


def room_of(module: str, room: str) -> str:
    """The inner room (or file) that a module of `room` belongs to; empty where it is of another room."""
    words = module.removeprefix("rankfleet.").split(".")
    return words[1] if words[0] == room and len(words) > 1 else ""


def inner_imports(path: Path, room: str) -> set[str]:
    """Rooms beside its own that a file of `room` imports, also where only types are checked."""
    package = path.relative_to(ROOT).with_suffix("").parts[:-1]
    targets = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            targets |= {a.name for a in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package[: len(package) + 1 - node.level]) if node.level else ""
            module = ".".join(x for x in (base, node.module) if x)
            targets |= {f"{module}.{a.name}" for a in node.names}
    here = room_of(".".join(path.relative_to(ROOT).with_suffix("").parts), room)
    return {r for t in targets if (r := room_of(t, room))} - {here}


@pytest.mark.parametrize("room", sorted(INSIDE))
def test_arrows_inside_a_room(room: str) -> None:
    order = list(INSIDE[room])
    for at, (inner, allowed) in enumerate(INSIDE[room].items()):
        assert set(allowed.split()) <= set(order[:at]), f"{room}/{inner} may import what stands above it"
    for path in (ROOT / room).rglob("*.py"):
        here = room_of(".".join(path.relative_to(ROOT).with_suffix("").parts), room)
        if here == "__init__":
            continue
        assert here in INSIDE[room], f"{path.relative_to(ROOT)}: `{here}` has no place in the order of rooms"
        back = inner_imports(path, room) - set(INSIDE[room][here].split())
        assert not back, f"{path.relative_to(ROOT)} imports {sorted(back)}"


def test_one_import_name() -> None:
    for path in ROOT.rglob("*.py"):
        if path.relative_to(ROOT).parts[0] in {".venv", ".venv-oldest", "rankfleet", "dist", "runs"}:
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and not node.level:
                names = [node.module or ""]
            bare = [n for n in names if n.partition(".")[0] in {*MAY, "simulator"}]
            assert not bare, (
                f"{path.relative_to(ROOT)} imports {bare}: a module under two names is two modules"
            )


def test_packaging_holds_no_python() -> None:
    assert not list((ROOT / "packaging").rglob("*.py"))


def test_sql_is_spoken_inside_the_store_alone() -> None:
    for room in MAY:
        for path in (ROOT / room).rglob("*.py"):
            assert path.name in ("tables.py", "database.py", "ledger.py") or "sqlalchemy" not in imports(
                path
            ), path


def test_no_pickle_and_no_remote_code() -> None:
    for room in MAY:
        for path in (ROOT / room).rglob("*.py"):
            assert not imports(path) & {"pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}, path
            assert "trust_remote_code=True" not in path.read_text(encoding="utf-8"), path


def test_posix_only_modules_stay_in_one_file() -> None:
    for room in MAY:
        for path in (ROOT / room).rglob("*.py"):
            if not path.name.startswith("platform_"):
                assert not imports(path) & {"fcntl", "resource", "pwd", "grp", "msvcrt"}, path


def test_no_wait_that_is_deaf_to_a_cancellation() -> None:
    for room in MAY:
        for path in (ROOT / room).rglob("*.py"):
            assert path.name == "within.py" or "wait_for(" not in path.read_text(encoding="utf-8"), path


def loaded_after(code: str) -> set[str]:
    done = subprocess.run(
        [sys.executable, "-c", f"import sys\n{code}\nprint(' '.join(sys.modules))"],
        capture_output=True,
        text=True,
        check=True,
        cwd=ROOT,
    )
    return set(done.stdout.split())


@pytest.mark.parametrize(
    "code",
    [
        "from rankfleet.edge_agent.cli import build; build()",
        "from rankfleet.coordinator.cli import build; build()",
        f"{IDLE}, rankfleet.edge_agent.machine.probe",
        "import rankfleet.coordinator.verbs.client; from rankfleet.federated.contract import catalogue; "
        "catalogue.entries()",
    ],
)
def test_programs_start_without_heavy_imports(code: str) -> None:
    heavy = {"numpy", "torch", "transformers", "peft", "sqlalchemy", "aiohttp", "safetensors"}
    allowed = {"numpy"} if "catalogue" in code else set()
    assert not loaded_after(code) & (heavy - allowed)


def test_idle_agent_does_without_cryptography() -> None:
    assert "cryptography" not in loaded_after(IDLE)


@pytest.mark.parametrize("program", ["edge_agent", "coordinator"])
def test_every_verb_has_an_example_and_json(program: str) -> None:
    import importlib

    parse = importlib.import_module(f"rankfleet.{program}.cli").build()
    verbs = parse._subparsers._group_actions[0].choices
    assert set(verbs) == (
        {"run", "enroll", "status", "infer", "doctor", "probe", "leave"}
        if program == "edge_agent"
        else {
            "serve",
            "submit",
            "jobs",
            "watch",
            "cancel",
            "pause",
            "resume",
            "rounds",
            "devices",
            "invite",
            "status",
            "approve",
            "backup",
            "restore",
            "operators",
            "broker",
            "arms",
            "methods",
            "versions",
            "export",
            "doctor",
        }
    )
    for name, verb in verbs.items():
        text = verb.format_help()
        assert "example:" in text, name
        assert "--json" in text, name
        assert name in verb.epilog
