"""The device's engine: quantisers, pruning, adapters, the training loop, data, outbox."""

import json
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from rankfleet.coordinator.planning import importance as channels
from rankfleet.edge_agent.config import Dataset
from rankfleet.edge_agent.exchange.outbox import Outbox
from rankfleet.edge_agent.model import Base
from rankfleet.edge_agent.model.ops import quantise
from rankfleet.edge_agent.model.ops.adapted import Site, apply
from rankfleet.edge_agent.model.ops.frozen import Frozen
from rankfleet.edge_agent.model.ops.layout import Layout
from rankfleet.edge_agent.model.ops.quantise import NF4, pack_nf4, packed_bytes, unpack_nf4
from rankfleet.edge_agent.order import (
    Meta,
    commit,
    last_state,
    read_update,
    result_of,
    state_file,
    update_file,
)
from rankfleet.edge_agent.status import Counters
from rankfleet.edge_agent.worker.data import Shard
from rankfleet.federated.contract.spec import Pair, Spec
from rankfleet.federated.errors import Refused
from rankfleet.federated.wire.messages import Blob
from rankfleet.federated.wire.transfer import blob_of
from rankfleet.profiles.card import read_card


def test_nf4_levels_are_normal_quantiles() -> None:
    normal = torch.distributions.Normal(0.0, 1.0)
    high = normal.icdf(torch.linspace(0.9677083, 0.5, 9, dtype=torch.float64)[:-1])
    low = -normal.icdf(torch.linspace(0.9677083, 0.5, 8, dtype=torch.float64)[:-1])
    levels = torch.cat([low, torch.zeros(1), high]).sort().values
    assert pytest.approx((levels / levels.abs().max()).tolist(), abs=2e-7) == NF4


@pytest.mark.parametrize(("bits", "error"), [(8, 0.01), (4, 0.12)])
def test_quantised_weights_are_near(bits: int, error: float) -> None:
    torch.manual_seed(0)
    weight = torch.randn(50, 96)
    base = Frozen(50, 96, Frozen.pack(weight, bits))
    assert (base.dense() - weight).norm() / weight.norm() < error
    assert base.nbytes() == packed_bytes(50 * 96, bits, 50)


@pytest.mark.parametrize("bits", [32, 8, 4])
def test_forward_and_backward_equal_those_of_the_dense_map(bits: int) -> None:
    """Three maps of one input: with a pair, with a frozen carry and a pair, bare; against autograd on
    plain products."""
    torch.manual_seed(0)
    sites = [
        Site(f"m{n}", 0, Frozen(out, 64, Frozen.pack(torch.randn(out, 64), bits), torch.randn(out)))
        for n, out in enumerate((24, 40, 8))
    ]
    for site, rank in zip(sites[:2], (3, 5), strict=True):
        site.place(torch.randn(rank, 64), torch.randn(site.base.out, rank), 1.5, True)
    sites[1].carry = torch.randn(40, 2), torch.randn(2, 64)
    x = torch.randn(5, 64, requires_grad=True)
    weights = [torch.randn(5, s.base.out) for s in sites]
    leaves = [x, *(t for s in sites[:2] for t in (s.A, s.B))]
    ours = torch.autograd.grad(
        sum((y * w).sum() for y, w in zip(apply(x, sites), weights, strict=True)), leaves
    )
    plain = []
    for s in sites:
        y = nn.functional.linear(x, s.base.dense(), s.base.bias)
        for a, b, scale in s.pairs():
            y = y + scale * (x @ a.t() @ b.t())
        plain.append(y)
    theirs = torch.autograd.grad(sum((y * w).sum() for y, w in zip(plain, weights, strict=True)), leaves)
    for a, b in zip(ours, theirs, strict=True):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-3 * b.abs().max().item())
    with torch.no_grad():
        assert all(torch.allclose(a, b, atol=1e-4) for a, b in zip(apply(x, sites), plain, strict=True))


def test_bitsandbytes_reads_our_packing_and_we_read_its() -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    torch.manual_seed(0)
    weight = torch.randn(320, 128)
    theirs, state = functional.quantize_4bit(weight, blocksize=64, quant_type="nf4", compress_statistics=True)
    packed = {"nf4": theirs.flatten(), "max8": state.absmax, "max": state.state2.absmax, "mean": state.offset}
    assert torch.equal(functional.dequantize_4bit(theirs, state), unpack_nf4(packed, 320, 128))
    ours = pack_nf4(weight)
    assert torch.equal(ours["nf4"], packed["nf4"])
    assert torch.equal(ours["max"], packed["max"])
    ragged = pack_nf4(weight[:50, :96])
    quantise._kernels.clear()
    expected = unpack_nf4(ours, 320, 128), unpack_nf4(ragged, 50, 96)
    try:
        if not quantise.use_bitsandbytes():
            assert tuple(map(int, version("bitsandbytes").split(".")[:2])) < (
                0,
                50,
            )  # older ones have no such kernel for the CPU
            return
        assert torch.equal(unpack_nf4(ours, 320, 128), expected[0])
        assert torch.equal(unpack_nf4(ragged, 50, 96), expected[1])
    finally:
        quantise._kernels.clear()


def test_pruned_model_equals_the_masked_one(tiny: Path) -> None:
    card = read_card(tiny)
    masks = channels.masks(card, channels.importance(tiny, card), 0.4)
    names = [m.name for m in card.modules]
    small, whole = Base(tiny, names, 32, masks), Base(tiny, names, 32, {})
    for m in card.modules:
        kept = masks.get(f"{m.name}.out")
        if kept is not None:
            gone = np.setdiff1d(np.arange(m.out), kept)
            base = whole.sites[m.name].base
            base.tensors = {"weight": base.tensors["weight"].clone()}
            base.tensors["weight"][gone] = 0
            base.bias[gone] = 0
    ids = torch.tensor([[2, 5, 9, 11, 3]])
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    a, b = (base.hidden(batch)[0] for base in (small, whole))
    assert torch.allclose(a, b, atol=1e-5)
    assert sum(s.base.nbytes() for s in small.sites.values()) < sum(
        s.base.nbytes() for s in whole.sites.values()
    )


def test_masks_are_nested_over_ratios(tiny: Path) -> None:
    card = read_card(tiny)
    scores = channels.importance(tiny, card)
    kept = [
        set(channels.masks(card, scores, r)["encoder.layer.0.intermediate.dense.out"].tolist())
        for r in (0.2, 0.4, 0.6)
    ]
    assert kept[2] < kept[1] < kept[0]
    assert channels.masks(card, scores, 0.0) == {}


def test_layers_below_the_boundary_keep_nothing_for_autograd(tiny: Path) -> None:
    card = read_card(tiny)
    base = Base(tiny, [m.name for m in card.modules], 32, {})
    pairs, tensors = {}, {}
    for m in card.modules:
        if m.layer == 1:
            pairs[m.name] = Pair(1, m.out, m.in_, 2, 2.0, m.out, m.in_, "v")
            tensors |= {f"{m.name}.A": np.ones((2, m.in_)), f"{m.name}.B": np.zeros((m.out, 2))}
    base.place(Spec(pairs, {}), tensors)
    kept: list[torch.Size] = []
    ids = torch.tensor([[2, 5, 3]])
    layout = Layout(torch.ones_like(ids))
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.shape) or t, lambda t: t):
        below = base.core.run(base.core.embed(ids, layout), layout, 0, 1)
        assert not kept
        base.core.run(below, layout, 1)
    assert kept
    assert len(base.parameters()) == 12


def test_the_carry_adds_and_is_frozen() -> None:
    torch.manual_seed(0)
    layer = Site("m", 0, Frozen(3, 4, Frozen.pack(torch.randn(3, 4), 32)))
    x = torch.randn(2, 4)
    (plain,) = apply(x, [layer])
    layer.place(torch.randn(2, 4), torch.randn(3, 2), 0.5, trained=True)
    layer.carry = (torch.randn(3, 1), torch.randn(1, 4))
    expected = plain + 0.5 * x @ layer.A.T @ layer.B.T + x @ layer.carry[1].T @ layer.carry[0].T
    assert torch.allclose(apply(x, [layer])[0], expected, atol=1e-6)
    layer.clear()
    layer.carry = None
    assert torch.equal(apply(x, [layer])[0], plain)


@pytest.mark.parametrize("ending", [".jsonl", ".csv", ".parquet"])
def test_files_of_every_kind(tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"data{ending}"
    if ending == ".jsonl":
        path.write_text(
            "\n".join(json.dumps({"body": f"t{i}", "class": "A" if i % 2 else "b"}) for i in range(40))
            + "\n\n"
        )
    elif ending == ".csv":
        path.write_text("body,class\n" + "\n".join(f"t{i},{'A' if i % 2 else 'b'}" for i in range(40)))
    else:
        pyarrow = pytest.importorskip("pyarrow")
        import pyarrow.parquet as parquet

        parquet.write_table(
            pyarrow.table(
                {"body": [f"t{i}" for i in range(40)], "class": ["A" if i % 2 else "b" for i in range(40)]}
            ),
            path,
        )
    shard = Shard(
        Dataset(str(path), columns={"text": "body", "label": "class"}, labels={"A": "a"}),
        "x",
        ["text", "label"],
        ["a", "b"],
    )
    assert len(shard.train) + len(shard.held) == 40
    assert {r["label"] for r in shard.train} == {0, 1}
    assert shard.held


def test_the_held_out_tenth_stays_aside_as_data_grow(tmp_path: Path) -> None:
    path = tmp_path / "d.jsonl"
    lines = [json.dumps({"text": f"t{i}", "label": "a"}) for i in range(300)]
    held = []
    for count in (100, 300):
        path.write_text("\n".join(lines[:count] + lines[:5]))
        shard = Shard(Dataset(str(path)), "x", ["text", "label"], ["a"])
        assert shard.duplicates == 5
        held.append({r["text"] for r in shard.held})
    assert held[0] < held[1]
    assert 10 < len(held[1]) < 60


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("data.txt", "none of .jsonl"), ("none.jsonl", "does not exist"),
        ("list.jsonl", "line 1 is not an object"),
        ("bad.parquet", "Parquet"), ("latin.csv", "codec can't decode"),
    ],
)  # fmt: skip
def test_unreadable_files(tmp_path: Path, name: str, message: str) -> None:
    (tmp_path / "data.txt").write_text("x")
    (tmp_path / "list.jsonl").write_text("[1, 2]")
    (tmp_path / "bad.parquet").write_bytes(b"nothing of the kind")
    (tmp_path / "latin.csv").write_bytes(b"text,label\n\xe4,a")
    with pytest.raises(Refused, match=message):
        Shard(Dataset(str(tmp_path / name)), "x", ["text", "label"], ["a"])


def test_update_and_state_are_committed_together(tmp_path: Path) -> None:
    result = result_of(tmp_path / "jobs", "j", 2)
    blob = blob_of(b"update", 1000)
    commit(result, b"update", b"state", Meta("j", 2, blob, b"s"))
    outbox = Outbox(tmp_path)
    assert [m.round for _, m in outbox.due()] == [2]
    assert read_update(update_file(result)) == (Meta("j", 2, blob, b"s"), b"update")
    assert last_state(result_of(tmp_path / "jobs", "j", 3)) == state_file(result)
    assert last_state(result) is None
    outbox.drop(result)
    assert outbox.due() == []
    assert outbox.finished(result)


def test_an_update_whose_state_was_lost_is_trained_again(tmp_path: Path) -> None:
    result = result_of(tmp_path / "jobs", "j", 0)
    commit(result, b"update", b"state", Meta("j", 0, blob_of(b"update", 100), b"s"))
    state_file(result).unlink()
    assert Outbox(tmp_path).due() == []
    assert not Outbox(tmp_path).finished(result)


@pytest.mark.parametrize("data", [b"", b"\xff\xff\xff\xff", b"\x05\0\0\0zzzzz", None])
def test_a_damaged_update_is_thrown_away_and_trained_again(tmp_path: Path, data: bytes | None) -> None:
    result = result_of(tmp_path / "jobs", "j", 0)
    commit(result, b"update", b"state", Meta("j", 0, Blob("00" * 32, 6, 100), b"s"))
    if data is not None:
        update_file(result).write_bytes(data)
    outbox = Outbox(tmp_path)
    assert [outbox.read(r) for r, _ in outbox.due()] in ([], [None])
    assert outbox.due() == []
    assert not update_file(result).exists()
    assert not Outbox(tmp_path).finished(result)


def test_counters_survive_and_forgive(tmp_path: Path) -> None:
    Counters(up=5).save(tmp_path / "c")
    assert Counters.load(tmp_path / "c").up == 5
    (tmp_path / "c").write_text("{")
    assert Counters.load(tmp_path / "c").up == 0


async def test_a_worker_over_its_memory_is_stopped_and_the_next_order_gets_a_new_one(tmp_path: Path) -> None:
    from rankfleet.edge_agent.order import Order
    from rankfleet.edge_agent.supervise.process import EngineFailed, ProcessEngine

    order = Order(str(tmp_path), b"", {}, str(tmp_path / "r000000"), Dataset("x"), "m", 1, 10.0, 1000)
    engine = ProcessEngine(memory_mb=None, idle_s=60)
    try:
        with pytest.raises(EngineFailed, match="not a message") as failed:
            await engine.run(order, lambda told: None)
        assert failed.value.code == "job"
        first = engine._process
        assert first is not None
        with pytest.raises(EngineFailed):
            await engine.run(order, lambda told: None)
        assert engine._process is first, "a failed order does not cost the worker"
        engine.memory_mb = -10_000.0
        codes = []
        while "memory" not in codes and len(codes) < 200:
            try:
                await engine.run(order, lambda told: None)
            except EngineFailed as error:
                codes.append(error.code)
                reason = str(error)
        assert "was stopped" in reason
        engine.memory_mb = None
        with pytest.raises(EngineFailed, match="not a message"):
            await engine.run(order, lambda told: None)
    finally:
        await engine.stop()


def test_slots_are_shared_and_given_back() -> None:
    import threading
    import time

    from rankfleet.edge_agent.machine import system

    inside, most = 0, 0

    def work() -> None:
        nonlocal inside, most
        with system.slot(1):
            inside += 1
            most = max(most, inside)
            time.sleep(0.05)
            inside -= 1

    threads = [threading.Thread(target=work) for _ in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join(30)
    assert (inside, most) == (0, 1)
