"""The activation cache: the same training with and without, bit for bit over a restart, every ingredient
of its name, damaged files."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from rankfleet.edge_agent.model import Base
from rankfleet.edge_agent.model.cache.activations import Activations, example_key
from rankfleet.edge_agent.model.cache.prefix import choose

from .families import ENCODERS, make

CASES = ("bert", "llama", "gpt2")


@pytest.fixture(scope="module", params=CASES)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, bool]:
    return make(
        request.param, tmp_path_factory.mktemp("models") / request.param
    ), request.param not in ENCODERS


def examples(count: int = 40) -> list[list[int]]:
    rng = np.random.default_rng(0)
    return [rng.integers(4, 60, rng.integers(3, 14)).tolist() for _ in range(count)]


def batch(ids: list[list[int]]) -> dict[str, Any]:
    longest = max(map(len, ids))
    padded, mask = (
        torch.ones(len(ids), longest, dtype=torch.long),
        torch.zeros(len(ids), longest, dtype=torch.long),
    )
    for row, one in enumerate(ids):
        padded[row, : len(one)], mask[row, : len(one)] = torch.tensor(one), 1
    return {"input_ids": padded, "attention_mask": mask, "key": torch.tensor([example_key(i) for i in ids])}


def adapted(
    folder: Path,
    causal: bool,
    lowest: int = 2,
    frozen: int | None = None,
    seed: int = 0,
    bits: int = 32,
    digest: str = "m",
    **more: Any,
) -> Base:
    base = Base(folder, [], bits, more.get("masks", {}), causal, digest=digest)
    generator = torch.Generator().manual_seed(seed)
    for name, site in sorted(base.sites.items()):
        if site.layer >= lowest or site.layer == frozen:
            a, b = (
                torch.randn(2, site.base.in_, generator=generator),
                torch.randn(site.base.out, 2, generator=generator),
            )
            site.place(0.2 * a, 0.2 * b, 0.5, site.layer >= lowest)
        del name
    return base


def gradients(base: Base, ids: list[list[int]]) -> list[torch.Tensor]:
    rows, layout = base.hidden(batch(ids))
    return list(torch.autograd.grad(rows[: layout.real].square().sum(), list(base.parameters().values())))


def test_gradients_with_it_are_those_without(model: tuple[Path, bool]) -> None:
    base, ids = adapted(*model), examples()
    plain = gradients(base, ids[:5])
    assert base.cache(2, ids, 10.0) == ""
    for _ in range(2):
        for a, b in zip(gradients(base, ids[:5]), plain, strict=True):
            assert (a - b).norm() <= 0.003 * b.norm()
    assert base.prefix is not None
    made = base.prefix.store.made
    gradients(base, ids[:5])
    assert base.prefix.store.made == made > 0


@pytest.mark.parametrize("disk", [False, True])
def test_a_restart_changes_no_bit(model: tuple[Path, bool], tmp_path: Path, disk: bool) -> None:
    """Other batches before, nothing kept or everything kept: the same states, so the same gradients."""
    ids = examples()
    room = (0.0, tmp_path, 10.0) if disk else (10.0, None, 0.0)
    first = adapted(*model)
    first.cache(2, ids, *room)
    gradients(first, ids[20:26])
    one = gradients(first, ids[:6])
    again = adapted(*model)
    again.cache(2, ids, *room)
    assert all(torch.equal(a, b) for a, b in zip(one, gradients(again, ids[:6]), strict=True))
    if disk:
        assert again.prefix is not None
        assert again.prefix.store.made == 0
        assert (tmp_path.stat().st_mode & 0o777) == 0o700


def test_layers_below_leave_memory_and_come_back(model: tuple[Path, bool]) -> None:
    base, ids = adapted(*model), examples(10)
    base.cache(2, ids, 10.0)
    base.lighten()
    assert base.core is not None
    assert base.core.layers[0] is not None, "not everything is kept yet"
    kept = gradients(base, ids)
    base.lighten()
    assert base.core.layers[:2] == [None, None]
    assert all(torch.equal(a, b) for a, b in zip(kept, gradients(base, ids), strict=True))
    base.prefix = None
    assert gradients(base, ids)[0].isfinite().all()
    assert base.core.layers[0] is not None


def test_a_boundary_that_moves_up_goes_on_from_what_is_there(model: tuple[Path, bool]) -> None:
    base, ids = adapted(*model, lowest=1), examples(10)
    base.cache(1, ids, 10.0)
    gradients(base, ids)
    for site in base.sites.values():
        if site.layer == 1:
            site.clear()
    plain = gradients_without(base, ids)
    assert base.cache(2, ids, 10.0) == ""
    assert base.prefix is not None
    assert base.prefix.lower is not None
    for a, b in zip(gradients(base, ids), plain, strict=True):
        assert (a - b).norm() <= 0.006 * b.norm()


def test_other_examples_get_a_store_of_their_own(model: tuple[Path, bool]) -> None:
    """The next job on the same model: nothing of the one before is looked up, and nothing is missing."""
    base, ids = adapted(*model), examples(20)
    base.cache(2, ids[:10], 10.0)
    gradients(base, ids[:10])
    assert base.cache(2, ids[10:], 10.0) == ""
    assert base.prefix is not None
    assert len(base.prefix.store) == 0
    assert all(g.isfinite().all() for g in gradients(base, ids[10:]))


def gradients_without(base: Base, ids: list[list[int]]) -> list[torch.Tensor]:
    kept, base.prefix = base.prefix, None
    try:
        return gradients(base, ids)
    finally:
        base.prefix = kept


MUTATIONS: dict[str, dict[str, Any]] = {
    "model": {"digest": "other"}, "bits": {"bits": 8}, "a frozen pair below": {"frozen": 0},
    "boundary": {"lowest": 1},
}  # fmt: skip


@pytest.mark.parametrize(
    "what",
    [
        *MUTATIONS,
        "values of a frozen pair",
        "scale of a frozen pair",
        "kept channels",
        "a carry below",
        "nothing",
    ],
)
def test_every_ingredient_changes_the_name(model: tuple[Path, bool], what: str) -> None:
    folder, causal = model
    one, other = adapted(folder, causal, frozen=None), adapted(folder, causal, **MUTATIONS.get(what, {}))
    if "of a frozen" in what:
        one, other = (adapted(folder, causal, frozen=0) for _ in range(2))
        site = next(s for s in other.sites.values() if s.layer == 0)
        assert site.A is not None
        if what.startswith("values"):
            site.A[0, 0] += 1e-3
        else:
            site.scale += 0.1
    if what == "kept channels":
        card = [
            s
            for s in other.sites.values()
            if s.layer == 0 and s.base.out == max(x.base.out for x in other.sites.values())
        ]
        other.masks = {f"{card[0].name}.out": np.arange(8)}
    if what == "a carry below":
        site = next(s for s in other.sites.values() if s.layer == 1)
        site.carry = torch.ones(site.base.out, 1), torch.ones(1, site.base.in_)
    names = [b._prefix_id(1 if b is other and what == "boundary" else 2) for b in (one, other)]
    assert (names[0] == names[1]) == (what == "nothing")


def test_what_is_above_the_boundary_does_not(model: tuple[Path, bool]) -> None:
    assert adapted(*model, seed=0)._prefix_id(2) == adapted(*model, seed=1)._prefix_id(2)
    assert example_key([1, 2, 3]) != example_key([1, 2, 4])
    assert example_key([1, 2]) != example_key([1, 2, 0])


def test_damaged_records_are_made_again(tmp_path: Path) -> None:
    rows = {k: torch.randn(k + 1, 8).half() for k in range(5)}
    store = Activations("n", 8, 0.0, tmp_path, 1.0)
    for k, r in rows.items():
        store.put(k, r)
    assert store.path is not None
    data = bytearray(store.path.read_bytes())
    data[-3] ^= 1
    store.path.write_bytes(bytes(data) + b"torn")
    again = Activations("n", 8, 0.0, tmp_path, 1.0)
    assert all(torch.equal(again.get(k), rows[k]) for k in range(4))  # type: ignore[arg-type]
    assert again.get(4) is None
    again.put(4, rows[4])
    assert torch.equal(Activations("n", 8, 0.0, tmp_path, 1.0).get(4), rows[4])  # type: ignore[arg-type]
    Activations("another", 8, 0.0, tmp_path, 1.0)
    assert not store.path.exists()


def test_room_is_bounded(tmp_path: Path) -> None:
    store = Activations("n", 100, 0.0004, tmp_path, 0.0005)
    for k in range(6):
        store.put(k, torch.zeros(1, 100).half())
    assert len(store) == 4
    assert store.path is not None
    assert store.path.stat().st_size <= 500


@pytest.mark.parametrize(("own", "common", "draws", "n", "keeps", "rounds", "at"), [
    (0, 0, 1000, 10, 5, 20, 0), (4, 4, 200, 1000, 1, 20, 4), (4, 2, 1000, 1000, 5, 20, 4),
    (4, 2, 300, 1000, 2, 20, 2),
    (4, 0, 300, 1000, 2, 20, 0), (4, 4, 10, 1000, 5, 20, 0),
])  # fmt: skip
def test_where_to_cut(own: int, common: int, draws: int, n: int, keeps: int, rounds: int, at: int) -> None:
    found, why = choose(own, common, draws, n, keeps, rounds)
    assert found == at
    assert bool(why) == (at == 0)
