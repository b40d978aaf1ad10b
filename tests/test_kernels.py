"""Kernel times by width: which a model reads, and when few-bit maps are computed with in bf16."""

import sys
from pathlib import Path

import pytest
import torch

from rankfleet.edge_agent.machine import probe, system
from rankfleet.edge_agent.model import Base
from rankfleet.profiles.kernels import half, key, times

from .edge_agent.families import make

MEASURED = {
    "32": 4.0,
    "16": 3.0,
    "32@896": 20.0,
    "16@896": 400.0,
    "4@2048": 90.0,
    "32@2048": 100.0,
    "16@2048": 95.0,
}


@pytest.mark.parametrize(
    ("hidden", "expected"), [(64, 4.0), (384, 4.0), (576, 4.0), (600, 20.0), (1024, 20.0), (4096, 100.0)]
)
def test_a_model_reads_the_nearest_width(hidden: int, expected: float) -> None:
    assert times(MEASURED, hidden)[32] == expected


def test_bf16_only_where_it_was_measured_faster() -> None:
    assert half(MEASURED, 384)
    assert not half(MEASURED, 896)  # an AVX2 machine
    assert not half(MEASURED, 2048)  # not worth it
    assert not half({}, 384)
    assert not half({"32": 4.0}, 384)


def test_an_agent_that_measured_one_width_still_counts() -> None:
    assert times({"32": 4.0, "4": 2.0}, 2048) == {32: 4.0, 4: 2.0}


def test_the_probe_measures_every_width() -> None:
    found = probe.kernels(widths=(384, 896), tokens=8)
    assert set(found) >= {key(b, w) for b in (32, 8, 4) for w in (384, 896)}
    assert all(v > 0 for v in found.values())


@pytest.mark.parametrize("bits", [8, 4])
def test_few_bits_in_bf16_stay_near_those_in_fp32(tmp_path: Path, bits: int) -> None:
    folder, ids = (
        make("llama", tmp_path),
        torch.randint(0, 61, (2, 9), generator=torch.Generator().manual_seed(1)),
    )
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    with torch.no_grad():
        wide, narrow = (Base(folder, [], bits, {}, True, half=h).hidden(batch)[0] for h in (False, True))
    assert not torch.equal(wide, narrow)
    assert (wide - narrow).norm() < 0.03 * wide.norm()


@pytest.mark.skipif(sys.platform != "linux", reason="other systems place threads themselves")
def test_the_fastest_cores_are_taken_where_they_differ(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_to: list[list[int]] = []
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: {0, 1, 2, 3})
    monkeypatch.setattr("os.sched_setaffinity", lambda pid, cores: set_to.append(cores))
    for n, capacity in enumerate((400, 1024, 400, 1024)):
        (tmp_path / f"cpu{n}").mkdir()
        (tmp_path / f"cpu{n}" / "cpu_capacity").write_text(f"{capacity}\n")
    assert system.pin(2, tmp_path) == [1, 3]
    assert system.pin(3, tmp_path) == [0, 1, 3]
    assert system.pin(4, tmp_path) == []  # all of them are needed
    assert set_to == [[1, 3], [0, 1, 3]]
    (tmp_path / "smt").mkdir()
    (tmp_path / "smt" / "active").write_text("1")
    assert system.pin(2, tmp_path) == []  # 1 and 3 may be one core
    (tmp_path / "smt" / "active").write_text("0")
    for n in range(4):
        (tmp_path / f"cpu{n}" / "cpu_capacity").write_text("1024")
    assert system.pin(2, tmp_path) == []
    assert system.pin(2, tmp_path / "none") == []
