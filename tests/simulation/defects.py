"""Planted defects: each takes one guard away. A harness that does not find them proves nothing.

Each is named after the promise that it breaks, and is found when some seed gives another result than the
run without faults.
"""

import contextlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import rankfleet.coordinator.exchange.receiving
import rankfleet.coordinator.queue
import rankfleet.coordinator.rounds.closing
import rankfleet.coordinator.rounds.nudges
import rankfleet.coordinator.rounds.opening
import rankfleet.coordinator.rounds.waiting
import rankfleet.coordinator.store.versions
import rankfleet.edge_agent.exchange.downloads
import rankfleet.edge_agent.exchange.outbox
import rankfleet.edge_agent.exchange.sending
import rankfleet.edge_agent.order
import rankfleet.federated.wire.transfer
from rankfleet.coordinator.exchange.downloads import Blobs
from rankfleet.coordinator.exchange.pending import Pending
from rankfleet.coordinator.exchange.receiving import Receiving
from rankfleet.federated.wire.messages import Receipt
from rankfleet.federated.wire.states import ARRIVED

DEFECTS: "dict[str, Callable[[], contextlib.AbstractContextManager[Any]]]" = {}


def defect(name: str) -> Any:
    """Register a function that yields while the guard is away."""

    def keep(function: Callable[[], Iterator[Any]]) -> Any:
        DEFECTS[name] = contextmanager(function)
        return function

    return keep


def lazy_write(path: Path, data: bytes, *args: Any, **options: Any) -> None:
    """Written, not synced."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.new")
    part.write_bytes(data)
    part.replace(path)


@defect("an update is on disk before its receipt")
def update_not_synced() -> Iterator[None]:
    with (
        patch.object(rankfleet.coordinator.exchange.receiving, "_write", lazy_write),
        patch.object(rankfleet.coordinator.exchange.receiving, "sync_folder", lambda p: None),
    ):
        yield


@defect("an update is in the ledger before its receipt")
def receipt_first() -> Iterator[None]:
    real = Receiving._take

    def take(self: Receiving, arrival: Any) -> None:
        self.send(arrival.key[2], Receipt(arrival.key[0], arrival.key[1], arrival.offer.blob.digest, True))
        real(self, arrival)

    with patch.object(Receiving, "_take", take):
        yield


@defect("a device keeps an update until the receipt, whatever the broker acknowledges")
def dropped_at_puback() -> Iterator[None]:
    real = rankfleet.edge_agent.exchange.sending.Sender._pieces

    async def pieces(self: Any, data: bytes, meta: Any, wanted: list[int]) -> bool:
        sent = await real(self, data, meta, wanted)
        if sent:
            self.outbox.drop(rankfleet.edge_agent.order.result_of(self.outbox.jobs, meta.job, meta.round))
        return sent

    with patch.object(rankfleet.edge_agent.exchange.sending.Sender, "_pieces", pieces):
        yield


@defect("a version and what went into it change together")
def settled_apart() -> Iterator[None]:
    later: list[Any] = []
    settle, close = rankfleet.coordinator.rounds.closing.settle, Pending.close

    def closed(self: Pending, job: str, number: int) -> None:
        if later:
            run, *rest = later.pop()
            with run.ledger.write() as tx:
                settle(run, tx, *rest)
        close(self, job, number)

    with ExitStack() as stack:
        stack.enter_context(
            patch.object(
                rankfleet.coordinator.rounds.closing,
                "settle",
                lambda run, tx, *rest: later.append((run, *rest)),
            )
        )
        stack.enter_context(patch.object(Pending, "close", closed))
        yield


@defect("methods' state on the server is part of a version")
def state_forgotten() -> Iterator[None]:
    real = rankfleet.coordinator.store.versions.Registry.save

    def save(self: Any, version: Any) -> str:
        whole, version.state = version.state, {}
        try:
            return real(self, version)
        finally:
            version.state = whole

    with patch.object(rankfleet.coordinator.store.versions.Registry, "save", save):
        yield


@defect("what arrives is checked against its digest")
def digest_unchecked() -> Iterator[None]:
    with ExitStack() as stack:
        stack.enter_context(
            patch.object(rankfleet.federated.wire.transfer.Assembly, "_wrong", lambda self: None)
        )
        stack.enter_context(patch.object(rankfleet.federated.wire.transfer.zlib, "crc32", lambda *data: 0))
        yield


@defect("a device that is silent is sent its assignment again")
def no_nudges() -> Iterator[None]:
    with patch.object(rankfleet.coordinator.rounds.nudges.Nudges, "send", lambda self, run, number: None):
        yield


async def patient(seconds: float, work: Any) -> Any:
    """Waits for ever."""
    return await work


@defect("an offer that is not answered is made again")
def offered_once() -> Iterator[None]:
    with patch.object(rankfleet.edge_agent.exchange.sending, "within", patient):
        yield


@defect("pieces that do not come are asked for again")
def wanted_once() -> Iterator[None]:
    with patch.object(rankfleet.edge_agent.exchange.downloads, "within", patient):
        yield


@defect("work of a job that is over is not begun again")
def done_again() -> Iterator[None]:
    with patch.object(rankfleet.edge_agent.exchange.outbox.Outbox, "over", lambda self, job: False):
        yield


@defect("a version is on disk before its row")
def version_not_synced() -> Iterator[None]:
    def folder(target: Path, files: dict[str, bytes]) -> None:
        for name, data in files.items():
            lazy_write(target / name, data)

    with patch.object(rankfleet.coordinator.store.versions, "write_folder", folder):
        yield


@defect("the state of an open round is on disk before devices hear of it")
def opening_not_synced() -> Iterator[None]:
    with patch.object(rankfleet.coordinator.rounds.opening, "write_atomic", lazy_write):
        yield


@defect("a finished round's update is on disk before its state")
def state_before_update() -> Iterator[None]:
    real = rankfleet.edge_agent.order.write_in_order

    def write(files: dict[Path, bytes]) -> None:
        for path, data in reversed(files.items()):
            real({path: data})

    with patch.object(rankfleet.edge_agent.order, "write_in_order", write):
        yield


@defect("a device whose receipt was lost gets another one")
def receipts_once() -> Iterator[None]:
    real = Receiving._still_wanted

    def wanted(self: Receiving, key: Any, offer: Any) -> bool:
        row = self.ledger.answer(*key)
        return False if row is not None and row["state"] in ARRIVED else real(self, key, offer)

    with patch.object(Receiving, "_still_wanted", wanted):
        yield


@defect("after a restart what devices fetch is offered again")
def blobs_forgotten() -> Iterator[None]:
    with patch.object(Blobs, "know", lambda self, blob: None):
        yield


@defect("a full disk makes a job wait")
def full_disk_ends_it() -> Iterator[None]:
    with patch.object(rankfleet.coordinator.queue, "PASSING", ()):
        yield


@defect("a download from before a power cut is checked")
def stale_download() -> Iterator[None]:
    def stored(folder: Path, digest: str) -> Path | None:
        return folder / digest if (folder / digest).exists() else None

    with patch.object(rankfleet.edge_agent.exchange.downloads, "stored", stored):
        yield
