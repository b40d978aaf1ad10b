"""The wheel takes one name, `rankfleet`: it lies beside PyPI's linter `bandit`, and both run."""

import os
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ALONE = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
"""With the checkout on the path, its folder `bandit` would come before the linter."""
NO_INDEX = ("No matching distribution found", "ConnectionError", "Temporary failure in name resolution")


def run(*command: str | Path) -> str:
    done = subprocess.run(
        [str(c) for c in command], capture_output=True, text=True, check=False, cwd="/", env=ALONE
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def pip(python: Path, *words: str | Path) -> None:
    """pip, or a skip where no index can be reached."""
    command = [str(python), "-m", "pip", "-q", "--disable-pip-version-check", *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=ALONE)
    if done.returncode and any(text in done.stderr for text in NO_INDEX):
        pytest.skip("no package index can be reached")
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a fresh environment's programs."""
    home = tmp_path_factory.mktemp("environment")
    venv.create(home, with_pip=True)
    return home / ("Scripts" if sys.platform == "win32" else "bin")


@pytest.fixture(scope="module")
def wheel(environment: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from this checkout."""
    out = tmp_path_factory.mktemp("wheel")
    pip(environment / "python", "wheel", "--no-deps", "-w", out, ROOT)
    return next(out.glob("rankfleet-*.whl"))


@pytest.mark.slow
def test_the_wheel_holds_rankfleet_and_nothing_beside_it(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        held = {n for n in archive.namelist() if ".dist-info/" not in n}
    rooms = [p.name for p in (ROOT / "rankfleet").iterdir() if p.is_symlink()]
    files = [
        p for room in rooms for p in (ROOT / room).rglob("*") if p.is_file() and "__pycache__" not in p.parts
    ]
    files += [*(ROOT / "rankfleet").glob("*.py"), ROOT / "rankfleet" / "py.typed"]
    assert held == {
        f"rankfleet/{p.relative_to(ROOT)}".replace("rankfleet/rankfleet/", "rankfleet/") for p in files
    }


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("way", ["wheel", "editable"])
def test_beside_the_linter_bandit(environment: Path, wheel: Path, way: str) -> None:
    ours = [wheel] if way == "wheel" else ["-e", ROOT]
    pip(environment / "python", "install", "--force-reinstall", "bandit", "numpy", *ours)
    assert "bandit" in run(environment / "bandit", "--version")
    assert run(environment / "rankfleet", "--version").startswith("rankfleet ")
    assert run(environment / "rankfleet", "agent", "--help") == run(environment / "edge-agent", "--help")
    assert run(environment / "rankfleet", "coordinator", "--help") == run(
        environment / "coordinator", "--help"
    )
    code = "import rankfleet.federated.methods.codecs.qsgd as q, bandit; from rankfleet import Method"
    code += "; print(q.__file__, bandit.__file__)"
    method, linter = run(environment / "python", "-c", code).split()
    assert ("site-packages" in method) == (way == "wheel")
    assert "site-packages" in linter
