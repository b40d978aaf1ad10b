"""The demo's data: the same on every machine with the same Python, disjoint, and unevenly spread as
promised."""

import sys
from collections import Counter

import pytest

from demo import corpus, rows
from rankfleet.federated.errors import RankfleetError

COUNTS = {(3, 11): 8831}
"""Paragraphs before sampling, by minor version; patch releases may differ by 2%."""
SHARES = [0.15, 0.20, 0.25, 0.40]


@pytest.fixture(scope="module")
def built() -> tuple[list[dict[str, str]], list[dict[str, str]], str]:
    return corpus.build()


def test_counts_are_those_of_this_python() -> None:
    found = corpus.collect()
    assert len({r["text"] for r in found}) == len(found)
    assert not {r["module"].partition(".")[0] for r in found} & {
        "tkinter",
        "idlelib",
        "turtle",
        "test",
        "ensurepip",
        "lib2to3",
        "distutils",
    }
    if sys.version_info[:2] in COUNTS:
        assert len(found) == pytest.approx(COUNTS[sys.version_info[:2]], rel=0.02)


def test_train_and_test_share_neither_text_nor_module(
    built: tuple[list[dict[str, str]], list[dict[str, str]], str],
) -> None:
    train, test, digest = built
    assert len(test) >= 1000
    assert 8 <= len({r["label"] for r in train}) <= 12
    assert {r["label"] for r in test} == {r["label"] for r in train}
    assert not {r["module"] for r in train} & {r["module"] for r in test}
    assert not {r["text"] for r in train} & {r["text"] for r in test}
    assert corpus.build()[2] == digest


def test_shards_are_uneven_and_every_device_has_six_areas(
    built: tuple[list[dict[str, str]], list[dict[str, str]], str],
) -> None:
    train, _, _ = built
    found = corpus.shards(train, list("abcd"), SHARES)
    assert sorted(r["text"] for part in found.values() for r in part) == sorted(r["text"] for r in train)
    sizes = [len(part) for part in found.values()]
    assert max(sizes) > 2 * min(sizes)
    for part in found.values():
        counts = Counter(r["label"] for r in part)
        assert len(counts) >= 6
        assert max(counts.values()) > 3 * len(part) / 10 / 2


def test_own_data_is_split_by_content_and_bad_data_is_one_error(tmp_path: object) -> None:
    from pathlib import Path

    path = Path(str(tmp_path)) / "mine.csv"
    path.write_text("body,topic\n" + "\n".join(f"text number {i},{'ab'[i % 2]}" for i in range(200)))
    train, test, _ = rows.split(str(path), "body", "topic")
    assert len(train) + len(test) == 200
    assert 20 < len(test) < 60
    for arguments, message in (
        ((str(path), "text", "topic"), "`text` and `topic` are wanted"),
        (("none.csv", "a", "b"), "does not exist"),
        (("hub:nobody/nothing-at-all", "a", "b"), "cannot be had"),
    ):
        with pytest.raises(RankfleetError, match=message):
            rows.split(*arguments)
    path.write_text("body,topic\nx,a")
    with pytest.raises(RankfleetError, match="2 to 64 make a classification task"):
        rows.split(str(path), "body", "topic")
