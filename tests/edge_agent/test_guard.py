"""The guard: what objects and how it is said; a worker that is stopped at once, goes on, and leaves with
what it did."""

import asyncio
import time
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import psutil
import pytest

from rankfleet.edge_agent.config import Disk
from rankfleet.edge_agent.model import Base
from rankfleet.edge_agent.order import Order
from rankfleet.edge_agent.supervise import disk, guard
from rankfleet.edge_agent.supervise.guard import Guard, GuardConfig, GuardedEngine
from rankfleet.edge_agent.supervise.process import EngineFailed
from rankfleet.edge_agent.tasks import engine
from rankfleet.edge_agent.worker.resume import Checkpoint, Halted
from rankfleet.edge_agent.worker.trainer import Trainer
from rankfleet.federated.contract.catalogue import build_stack
from rankfleet.federated.contract.client_side import ClientSide
from rankfleet.federated.contract.contexts import Round
from rankfleet.federated.contract.spec import Dense, Pair, Spec
from rankfleet.federated.contract.stack import Stack
from rankfleet.federated.program.loader import loads
from rankfleet.federated.wire.messages import Recipe, Task
from rankfleet.profiles.card import read_card

ORDER: Any = SimpleNamespace(name="order")


@pytest.fixture
def calm(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """A machine on mains, cool, with nobody at it."""
    monkeypatch.setattr(guard, "battery_now", lambda: (80.0, True))
    monkeypatch.setattr(guard, "celsius", lambda: 40.0)
    monkeypatch.setattr(guard, "user_idle_s", lambda: 1e6)
    monkeypatch.setattr(guard, "metered", lambda: False)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=4e9))
    monkeypatch.setattr(psutil, "cpu_percent", lambda: 5.0)
    return monkeypatch


@pytest.mark.parametrize(("name", "value", "settings", "said"), [
    ("battery_now", (12.0, False), {}, "battery at 12%"),
    ("battery_now", (99.0, False), {"battery_percent": 100}, "battery at 99%"),
    ("celsius", 95.0, {}, "95 °C"), ("user_idle_s", 20.0, {"idle_s": 60}, "somebody typed 20 s ago"),
    ("metered", True, {"metered": False}, "metered"),
])  # fmt: skip
def test_what_objects(
    calm: pytest.MonkeyPatch, name: str, value: Any, settings: dict[str, Any], said: str
) -> None:
    assert Guard(GuardConfig(**settings)).objects() == ""
    kept = Guard(GuardConfig(**settings))
    calm.setattr(guard, name, lambda: value)
    assert said in kept.objects()


def test_memory_and_other_programs(calm: pytest.MonkeyPatch) -> None:
    kept = Guard(GuardConfig(busy_percent=50))
    calm.setattr(psutil, "cpu_percent", lambda: 80.0)
    assert "other programs take 80%" in kept.objects()
    calm.setattr(psutil, "cpu_percent", lambda: 5.0)
    calm.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=1e8))
    assert "100 MB of memory are free" in kept.objects()
    assert kept.short_of_memory()


def test_heat_has_to_fall_before_it_goes_on(calm: pytest.MonkeyPatch) -> None:
    kept = Guard(GuardConfig(max_celsius=80))
    for heat, stops in ((79.0, False), (81.0, True), (77.0, True), (74.0, False), (79.0, False)):
        calm.setattr(guard, "celsius", lambda heat=heat: heat)
        assert bool(kept.objects()) == stops, heat


@pytest.mark.parametrize(("hours", "at", "allowed"), [
    ("22:00-06:30", (23, 0), True), ("22:00-06:30", (6, 29), True), ("22:00-06:30", (6, 30), False),
    ("22:00-06:30", (12, 0), False),
    ("09:00-17:00", (9, 0), True), ("09:00-17:00", (17, 0), False),
])  # fmt: skip
def test_the_schedule(calm: pytest.MonkeyPatch, hours: str, at: tuple[int, int], allowed: bool) -> None:
    assert bool(Guard(GuardConfig(hours=hours), lambda: datetime(2026, 1, 1, *at)).objects()) != allowed


def test_a_schedule_that_cannot_be_read_is_refused() -> None:
    with pytest.raises(Exception, match="22:00-06:30"):
        loads("hours: at night", GuardConfig, "agent.yaml")


def test_sensors_of_this_machine_can_be_asked() -> None:
    assert guard.celsius() is None or -20 < guard.celsius() < 130  # type: ignore[operator]
    assert guard.user_idle_s() >= 0
    assert guard.metered() in (True, False)
    assert guard.battery_now() is None or 0 <= guard.battery_now()[0] <= 100  # type: ignore[index]


class FakeEngine:
    """Works until told otherwise."""

    def __init__(self) -> None:
        self.said: list[str] = []
        self.pid = None
        self.runs = 0
        self.left = asyncio.Event()
        self.done = asyncio.Event()

    async def run(self, order: Any, progress: Any) -> None:
        self.runs += 1
        self.left.clear()
        waits = [asyncio.create_task(e.wait()) for e in (self.left, self.done)]
        await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        for w in waits:
            w.cancel()
        if self.left.is_set():
            raise EngineFailed("halted", "")

    def pause(self) -> None:
        self.said.append("pause")

    def resume(self) -> None:
        self.said.append("resume")

    async def leave(self) -> None:
        self.said.append("leave")
        self.left.set()

    async def stop(self) -> None:
        return None


async def until(what: Callable[[], bool], seconds: float = 5.0) -> float:
    began = time.monotonic()
    while not what():
        assert time.monotonic() - began < seconds, "too long"
        await asyncio.sleep(0.01)
    return time.monotonic() - began


async def test_it_pauses_within_a_second_and_goes_on(calm: pytest.MonkeyPatch) -> None:
    inner, told = FakeEngine(), []
    engine = GuardedEngine(inner, Guard(GuardConfig()), told.append)  # type: ignore[arg-type]
    work = asyncio.create_task(engine.run(ORDER, print))
    await until(lambda: inner.runs == 1)
    calm.setattr(guard, "battery_now", lambda: (5.0, False))
    assert await until(lambda: "pause" in inner.said) < 1.0
    assert "battery at 5%" in told[-1]
    calm.setattr(guard, "battery_now", lambda: (5.0, True))
    assert await until(lambda: "resume" in inner.said) < 1.0
    assert told[-1] == ""
    inner.done.set()
    await work
    assert inner.runs == 1


async def test_short_of_memory_it_leaves_and_comes_back(calm: pytest.MonkeyPatch) -> None:
    inner = FakeEngine()
    engine = GuardedEngine(inner, Guard(GuardConfig()))  # type: ignore[arg-type]
    work = asyncio.create_task(engine.run(ORDER, print))
    await until(lambda: inner.runs == 1)
    calm.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=1e7))
    await until(lambda: "leave" in inner.said)
    await asyncio.sleep(0.7)
    assert inner.runs == 1, "it waits while memory is short"
    calm.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=4e9))
    await until(lambda: inner.runs == 2)
    inner.done.set()
    await work


async def test_an_order_that_somebody_else_ended_is_not_begun_again(calm: pytest.MonkeyPatch) -> None:
    inner = FakeEngine()
    work = asyncio.create_task(GuardedEngine(inner, Guard(GuardConfig())).run(ORDER, print))  # type: ignore[arg-type]
    await until(lambda: inner.runs == 1)
    inner.left.set()
    with pytest.raises(EngineFailed):
        await work
    assert inner.runs == 1


async def test_a_real_worker_stops_goes_on_and_leaves(tmp_path: Path) -> None:
    from rankfleet.edge_agent.config import Dataset
    from rankfleet.edge_agent.supervise.process import ProcessEngine

    engine = ProcessEngine(memory_mb=None, idle_s=60)
    try:
        with pytest.raises(EngineFailed, match="not a message"):
            await engine.run(
                Order(str(tmp_path), b"", {}, str(tmp_path / "r000000"), Dataset("x"), "m", 1, 10.0, 1000),
                lambda told: None,
            )
        assert engine.pid is not None
        worker = psutil.Process(engine.pid)
        engine.pause()
        await until(lambda: worker.status() == psutil.STATUS_STOPPED, 1.0)
        engine.resume()
        await until(lambda: worker.status() != psutil.STATUS_STOPPED, 1.0)
        began = time.monotonic()
        await engine.leave()
        assert time.monotonic() - began < 1.5
        assert not worker.is_running() or worker.status() == psutil.STATUS_ZOMBIE
    finally:
        await engine.stop()


async def test_nothing_begins_while_something_objects(calm: pytest.MonkeyPatch) -> None:
    calm.setattr(guard, "battery_now", lambda: (5.0, False))
    inner = FakeEngine()
    work = asyncio.create_task(GuardedEngine(inner, Guard(GuardConfig())).run(ORDER, print))  # type: ignore[arg-type]
    await asyncio.sleep(0.7)
    assert inner.runs == 0
    work.cancel()


def trainer(
    tiny: Path, checkpoint: Checkpoint | None, stack: list[Any]
) -> tuple[Trainer, dict[str, Any], list[int]]:
    """A whole trainer on the tiny model, with momentum, a method with state and one with random numbers."""
    card = read_card(tiny)
    base = Base(tiny, [], 32, {})
    rng = np.random.default_rng(0)
    pairs = {m.name: Pair(m.layer, m.out, m.in_, 2, 2.0, m.out, m.in_, "") for m in card.modules}
    tensors = {f"{m.name}.A": rng.standard_normal((2, m.in_)).astype(np.float32) for m in card.modules}
    tensors |= {f"{m.name}.B": np.zeros((m.out, 2), np.float32) for m in card.modules}
    tensors |= {
        "head.weight": rng.standard_normal((2, 16)).astype(np.float32),
        "head.bias": np.zeros(2, np.float32),
    }
    spec = Spec(pairs, {"head.weight": Dense([2, 16]), "head.bias": Dense([2])})
    job: Any = SimpleNamespace(job="j", round=1, rounds=3, recipe=Recipe(32, 4, 9, 0.05), seed=1)
    client = ClientSide(
        Stack(build_stack(stack), "factors"),
        "j",
        Round(1, 3),
        "d",
        spec,
        steps=9,
        lr=0.05,
        down={},
        state=None,
    )
    task = engine(Task("d", "text_classification", ["a", "b"], 8), str(tiny))
    rows = task.encode(
        [
            {"text": w, "label": n % 2}
            for n, w in enumerate(("red sun", "blue", "cat dog bird", "tree", "rock sea", "moon"))
        ]
    )
    base.place(spec, tensors)
    steps: list[int] = []
    made = Trainer(base, task, job, client, rows, lambda step, loss: steps.append(step))
    made.checkpoint = checkpoint
    return made, client.begin(tensors), steps


@pytest.mark.parametrize("stack", [[], ["scaffold"], [{"fedprox": {"mu": 0.1}}], ["dp_lora"]])
def test_a_round_that_was_cut_off_gives_the_same_bits(tiny: Path, tmp_path: Path, stack: list[Any]) -> None:
    whole, start, _ = trainer(tiny, None, stack)
    expected = whole.run(start, {})
    steps: list[int] = []
    part = Checkpoint(tmp_path / "r.part", "a", lambda: len(steps) in (3, 7))
    cut, start, steps = trainer(tiny, part, stack)
    with pytest.raises(Halted, match="step 3"):
        cut.run(start, {})
    again, start, more = trainer(tiny, Checkpoint(tmp_path / "r.part", "a", lambda: False), stack)
    found = again.run(start, {})
    assert more[0] == 4
    for name, tensor in expected.items():
        assert np.array_equal(found[name], tensor), name
    assert again.client.saved().keys() == whole.client.saved().keys()


def test_another_assignment_or_a_damaged_file_begins_anew(tiny: Path, tmp_path: Path) -> None:
    first, start, _ = trainer(tiny, Checkpoint(tmp_path / "r.part", "a", lambda: True), [])
    with pytest.raises(Halted):
        first.run(start, {})
    other, start, steps = trainer(tiny, Checkpoint(tmp_path / "r.part", "b", lambda: False), [])
    other.run(start, {})
    assert steps[0] == 1
    (tmp_path / "r.part").write_bytes(b"torn")
    broken, start, steps = trainer(tiny, Checkpoint(tmp_path / "r.part", "a", lambda: False), [])
    broken.run(start, {})
    assert steps[0] == 1


def test_pieces_of_a_batch_give_its_gradient(tiny: Path) -> None:
    whole, start, _ = trainer(tiny, None, [])
    pieces, _, _ = trainer(tiny, None, [])
    pieces.steps.micro = 1
    one, other = whole.run(start, {}), pieces.run(start, {})
    for name, tensor in one.items():
        assert np.allclose(other[name], tensor, atol=1e-4), name


def test_writes_are_counted_by_the_day(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = disk.Writes(tmp_path, Disk(quota_mb=1000, writes_mb_per_day=100))
    kept.add(60)
    again = disk.Writes(tmp_path, Disk(quota_mb=1000, writes_mb_per_day=100))
    assert (again.today, again.left_mb()) == (60, 40)
    assert again.room(10_000) == (1000, 40)
    assert again.room(30) == (15, 15)
    again.card = True
    assert again.room(10_000) == (1000, 0)
    monkeypatch.setattr(time, "strftime", lambda form: "2099-01-01")
    assert again.left_mb() == 100
    assert again.total == 60
    (tmp_path / "disk.json").write_text("[]")
    assert disk.Writes(tmp_path, Disk()).total == 0


def test_cards_are_known_by_what_the_system_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import os

    number = os.stat(tmp_path).st_dev
    device = tmp_path / f"{os.major(number)}:{os.minor(number)}"
    device.mkdir()
    monkeypatch.setattr(disk, "BLOCK", tmp_path)
    assert not disk.removable(tmp_path)
    (device / "removable").write_text("1\n")
    assert disk.removable(tmp_path)
    (device / "removable").write_text("0\n")
    (device / "device").mkdir()
    (device / "device/type").write_text("SD\n")
    assert disk.removable(tmp_path)


def test_the_order_carries_everything() -> None:
    assert {"cache_mb", "shelf_mb"} <= set(Order.__struct_fields__)
