"""`rankfleet new method` writes a method and a test that run as they are written."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from rankfleet import new

ROOT = Path(__file__).parent.parent


def checkout(folder: Path) -> Path:
    """The part of a checkout that the program looks at."""
    for family in ("codecs", "objectives"):
        (folder / "federated" / "methods" / family).mkdir(parents=True)
        (folder / "federated" / "methods" / family / "__init__.py").touch()
    return folder


def passes(*words: object, cwd: Path) -> None:
    command = [sys.executable, "-m", *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=cwd)
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_package_of_its_own_passes_its_test(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert new.main(["method", "fed_mine", "--into", str(tmp_path)]) == 0
    assert "test_fed_mine.py" in capsys.readouterr().out
    passes("pytest", "-q", "-p", "no:cacheprovider", "test_fed_mine.py", cwd=tmp_path)
    project = (tmp_path / "pyproject.toml").read_text(encoding="utf-8")
    assert '[project.entry-points."rankfleet.methods"]\nfed_mine = "fed_mine"' in project


def test_in_a_checkout_it_goes_to_its_place(tmp_path: Path) -> None:
    root = checkout(tmp_path)
    assert new.main(["method", "fed_mine", "--family", "codecs", "--into", str(root)]) == 0
    written = root / "federated" / "methods" / "codecs" / "fed_mine.py"
    place = ROOT / "federated" / "methods" / "codecs" / "zz_written_by_a_test.py"
    assert (root / "tests" / "methods" / "test_fed_mine.py").exists()
    try:
        shutil.copy(written, place)
        passes("ruff", "check", "-q", str(place), cwd=ROOT)
        use = "from rankfleet.federated.methods.codecs.zz_written_by_a_test import FedMine"
        passes("timeit", "-n", "1", "-s", use, "assert FedMine().share == 0.5", cwd=ROOT)
    finally:
        place.unlink(missing_ok=True)


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["Fed-Mine", "--family", "codecs"], "cannot be the name of a method"),
        (["lambda", "--family", "codecs"], "cannot be the name of a method"),
        (["../evil", "--family", "codecs"], "cannot be the name of a method"),
        (["json", "--family", "codecs"], "cannot be the name of a method"),
        (["method", "--family", "codecs"], "cannot be the name of a method"),
        (["fed_mine", "--family", "class", "--new-family"], "there is no family `class`"),
        (["sparse", "--family", "codecs"], "there is a method `sparse` already"),
        (["fed_mine"], "a method belongs to a family"),
        (["fed_mine", "--family", "magic"], "there is no family `magic`"),
        (["fed_mine", "--family", "../../x", "--new-family"], "there is no family"),
    ],
)
def test_what_cannot_be_meant(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], reason: str
) -> None:
    root = checkout(tmp_path)
    before = sorted(root.rglob("*"))
    assert new.main(["method", *words, "--into", str(root)]) == 1
    assert reason in capsys.readouterr().err
    assert sorted(root.rglob("*")) == before


def test_nothing_is_overwritten(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert new.main(["method", "fed_mine", "--into", str(tmp_path)]) == 0
    (tmp_path / "fed_mine.py").write_text("mine")
    (tmp_path / "test_fed_mine.py").unlink()
    assert new.main(["method", "fed_mine", "--into", str(tmp_path)]) == 1
    assert "exists" in capsys.readouterr().err
    assert (tmp_path / "fed_mine.py").read_text() == "mine"
    assert not (tmp_path / "test_fed_mine.py").exists()


def test_a_new_family(tmp_path: Path) -> None:
    root = checkout(tmp_path)
    assert new.main(["method", "fed_mine", "--family", "magic", "--new-family", "--into", str(root)]) == 0
    assert (root / "federated" / "methods" / "magic" / "__init__.py").exists()
