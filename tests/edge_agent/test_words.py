"""The embedding rows that are kept: those of the texts, equal to the table's, and gone with the
embeddings."""

from pathlib import Path
from typing import Any

import pytest
import torch

from rankfleet.edge_agent.model import Base
from rankfleet.edge_agent.model.stored.words import Words

from .families import make
from .test_activations import adapted, batch, examples


def test_each_row_is_read_once() -> None:
    table, readings = torch.randn(50, 4), []

    def read() -> torch.Tensor:
        readings.append(1)
        return table

    words = Words(read)
    for ids in ([3, 7, 3], [7, 3, 3], [9, 3, 0], [49]):
        assert torch.equal(words.take(torch.tensor(ids)), table[ids])
    assert (len(words), len(readings)) == (5, 4)
    words.read(torch.tensor([1, 2, 49]))
    assert torch.equal(words.take(torch.tensor([2, 1, 0])), table[[2, 1, 0]])
    assert (len(words), len(readings)) == (7, 5)
    words.forget()
    assert len(words) == 0
    assert torch.equal(words.take(torch.tensor([2])), table[[2]])
    with pytest.raises(IndexError):
        words.take(torch.tensor([50]))


@pytest.mark.parametrize(
    ("family", "causal", "kept"), [("bert", False, True), ("llama", True, True), ("qwen2", True, False)]
)
def test_a_base_keeps_what_its_texts_use(family: str, causal: bool, kept: bool, tmp_path: Path) -> None:
    """A decoder whose embeddings are its output table needs them whole."""
    folder = make(family, tmp_path / family)
    base = Base(folder, [], 32, {}, causal)
    assert base.core is not None
    if not kept:
        assert base.core.words is None
        return
    assert base.core.words is not None
    base.read_words([[4, 5, 6], [6, 7]])
    assert len(base.core.words) == 4
    whole = base.core.words
    base.core.words = None
    expected = base.hidden(batch([[4, 5, 6, 8], [6]]))[0]
    base.core.words = whole
    assert torch.equal(base.hidden(batch([[4, 5, 6, 8], [6]]))[0], expected)


def test_a_decoder_with_its_own_output_table_answers_when_its_embeddings_are_gone(tmp_path: Path) -> None:
    base, ids = adapted(make("llama", tmp_path / "llama"), True), examples(10)
    base.cache(2, ids, 10.0)
    made: dict[str, Any] = batch(ids)
    made["labels"] = torch.where(made["attention_mask"] > 0, made["input_ids"], -100)
    before = base.answers(made)[0]
    base.lighten()
    assert base.core is not None
    assert "word" not in base.core.tables
    assert base.core.words is not None
    assert len(base.core.words) == 0
    assert torch.equal(base.answers(made)[0], before)


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_importance_counts_no_row_without_a_token(family: str, tmp_path: Path) -> None:
    ids = examples(5)
    assert len({len(i) for i in ids}) > 1
    seen = []
    for groups in ([ids], [[i] for i in ids]):
        base = Base(make(family, tmp_path / family), [], 32, {}, family != "bert")
        assert base.core is not None
        base.core.seen = {}
        with torch.no_grad():
            for group in groups:
                base.hidden(batch(group))
        seen.append(base.core.seen)
    for name, squares in seen[0].items():
        torch.testing.assert_close(squares, seen[1][name], rtol=1e-4, atol=1e-5)
