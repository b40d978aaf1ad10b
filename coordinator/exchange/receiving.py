"""Updates at the door: known, signed, sound; then on disk and in the ledger; and only then receipted.

What arrives while the disk is busy is written down together: one commit for as many updates as have come.
"""

import asyncio
import logging
import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from rankfleet.federated.errors import WireError
from rankfleet.federated.program.files import digest_of, sync_folder
from rankfleet.federated.trust.roster import signed_by
from rankfleet.federated.wire.messages import Message, Offer, Receipt, Report, manifest
from rankfleet.federated.wire.states import ARRIVED

from ..config import Limits
from ..fleet.devices import Devices
from ..store import database
from ..store.ledger import Ledger
from . import checks
from .pending import Key, Pending
from .uploads import Upload, Uploads

log = logging.getLogger(__name__)
HELD_BYTES = 8 << 20
"""Updates in memory that wait for the disk; when there are more, offers wait for a grant, and pieces go to
files."""


class Arrival(NamedTuple):
    """A whole update: in memory, or as a file in the spool."""

    key: Key
    offer: Offer
    data: bytes
    path: Path | None
    resumed: int


class Receiving:
    """The coordinator's side of every upload."""

    def __init__(
        self,
        home: Path,
        limits: Limits,
        ledger: Ledger,
        devices: Devices,
        pending: Pending,
        send: Callable[[str, Message], None],
        changed: Callable[[], None],
        live: dict[str, dict[str, Any]],
    ) -> None:
        self.home, self.ledger, self.devices, self.pending, self.send, self.changed, self.live = (
            home, ledger, devices, pending, send, changed, live,
        )  # fmt: skip
        self.uploads = Uploads(
            home / "spool", limits, send, self._assembled, self.put_aside, lambda: self._held < HELD_BYTES
        )
        self.limits = limits
        self.refused: Callable[[str, str], None] = lambda device, reason: None
        """Told of every update that is refused for good."""
        self._queue: list[Arrival] = []
        self._waiting: set[Key] = set()
        self._held = 0
        self._disk = ThreadPoolExecutor(1, "disk")
        self._task: asyncio.Task[None] | None = None

    def stop(self) -> None:
        """No receipt is given after this."""
        if self._task:
            self._task.cancel()
        self._disk.shutdown(wait=True)

    def offered(self, device: str, offer: Offer) -> None:
        """A device has an update: take it, grant it, or say what became of it."""
        key = (offer.job, offer.round, device)
        if key in self._waiting:
            return
        if self.pending.get(key) is None and not self._still_wanted(key, offer):
            return
        if self.uploads.full():
            return  # it keeps its update and offers again
        if (
            offer.data
            and self._held + len(offer.data) <= HELD_BYTES
            and len(offer.data) <= self.limits.update_mb * 1e6
        ):
            if len(offer.data) != offer.blob.size or digest_of(offer.data) != offer.blob.digest:
                raise WireError(f"the update of round {offer.round} is not what its offer says")
            self._take(Arrival(key, offer, offer.data, None, 0))
        else:
            self.uploads.offer(device, offer)

    def _still_wanted(self, key: Key, offer: Offer) -> bool:
        """What the ledger says of an update whose assignment is not open; the device is answered where it
        says no."""
        row = self.ledger.answer(*key)
        if row is None:
            self._refuse(
                key, offer, f"no assignment of round {offer.round} in job `{offer.job[:64]}` is known"
            )
        elif row["state"] in ARRIVED:
            same = row["digest"] == offer.blob.digest
            reason = "" if same else "another update of this round was taken"
            self.send(key[2], Receipt(offer.job, offer.round, offer.blob.digest, same, reason))
        elif row["state"] == "refused":
            self._refuse(key, offer, row["reason"])
        else:
            return True
        return False

    def _refuse(self, key: Key, offer: Offer, reason: str) -> None:
        self.send(key[2], Receipt(offer.job, offer.round, offer.blob.digest, False, reason))

    def put_aside(self, device: str, offer: Offer, reason: str) -> None:
        """An update that will never be taken: its assignment is closed with the reason."""
        key = (offer.job, offer.round, device)
        self.ledger.refuse(*key, reason)
        self.ledger.tell(offer.job, device, f"its update of round {offer.round} was refused: {reason}")
        self.pending.done(key)
        self._refuse(key, offer, reason)
        self.refused(device, reason)
        self.changed()

    def reported(self, device: str, report: Report) -> None:
        """Where a device stands; a failure closes its assignment."""
        self.live.setdefault(device, {}).update(state=report.state, round=report.round)
        key = (report.job, report.round, device)
        row = self.pending.get(key)
        if report.state not in ("failed", "refused") or row is None:
            return
        self.ledger.failed(*key, report.state, report.reason, report.code, row.seconds())
        self.pending.done(key)
        self.ledger.tell(report.job, device, f"round {report.round}: {report.reason}")
        self.changed()

    def gone(self, device: str, reason: str) -> None:
        """A device that is not there any more is not waited for."""
        for key in self.pending.of(device):
            if self.ledger.refuse(*key, reason, before="assigned"):
                self.ledger.tell(key[0], device, f"round {key[1]}: {reason}")
            self.pending.done(key)

    def _assembled(self, upload: Upload, content: bytes | Path) -> None:
        offer, key = upload.offer, (upload.offer.job, upload.offer.round, upload.device)
        data, path = (content, None) if isinstance(content, bytes) else (b"", content)
        self._take(Arrival(key, offer, data, path, upload.resumed))

    def _take(self, arrival: Arrival) -> None:
        self._queue.append(arrival)
        self._waiting.add(arrival.key)
        self._held += len(arrival.data)
        if self._task is None or self._task.done():
            self._task = asyncio.create_task(self._writing(), name="receiving")

    async def _writing(self) -> None:
        """Batch after batch, as long as there are any."""
        while self._queue:
            batch, self._queue = self._queue, []
            try:
                answers = await asyncio.get_running_loop().run_in_executor(self._disk, self._store, batch)
            except Exception as error:
                # Nothing is receipted, so nothing is lost: the devices offer again.
                log.exception("updates cannot be written down")
                answers = [error] * len(batch)
            for arrival, answer in zip(batch, answers, strict=True):
                self._waiting.discard(arrival.key)
                self._held -= len(arrival.data)
                self._answer(arrival, answer)
            self.changed()

    def _answer(self, arrival: Arrival, answer: dict[str, Any] | Exception) -> None:
        job, round, device = arrival.key
        if isinstance(answer, WireError):
            self.put_aside(device, arrival.offer, str(answer))
        elif isinstance(answer, Exception):
            self.live.setdefault(device, {})["last_error"] = f"its update cannot be stored: {answer}"
        else:
            self.pending.done(arrival.key)
            self.live[device] = {
                "state": "done",
                "round": round,
                "loss": answer.get("loss_after"),
                "resumed": arrival.resumed,
            }
            self.send(device, Receipt(job, round, arrival.offer.blob.digest, True))

    def _store(self, batch: list[Arrival]) -> list[dict[str, Any] | Exception]:
        """In the disk's thread: files first, then one transaction."""
        folders, rows = set(), []
        answers: list[dict[str, Any] | Exception] = []
        for arrival in batch:
            try:
                told, seconds, folder = self._place(arrival)
            except (WireError, OSError) as error:
                if isinstance(error, WireError) and arrival.path:
                    arrival.path.unlink(missing_ok=True)
                answers.append(error)
                continue
            folders.add(folder)
            answers.append(told)
            job, round, device = arrival.key
            rows.append(
                {
                    "job": job, "round": round, "device": device, "digest": arrival.offer.blob.digest,
                    "telemetry": database.text(told), "seconds": seconds, "resumed": arrival.resumed,
                }
            )  # fmt: skip
        for folder in folders:
            sync_folder(folder)
        if rows:
            with self.ledger.write() as tx:
                tx.received(rows)
        return answers

    def _place(self, arrival: Arrival) -> tuple[dict[str, Any], float, Path]:
        """Check one update and put its file in place. Returns (its report, seconds since it was asked for,
        the folder)."""
        job, round, device = arrival.key
        offer, public = arrival.offer, self.devices.public(device)
        if not public or not signed_by(
            public, offer.signature, manifest(job, round, device, offer.blob.digest)
        ):
            raise WireError("the update is not signed by this device's key")
        data = arrival.data or (arrival.path.read_bytes() if arrival.path else b"")
        told = {**checks.check(data), "cost": checks.bounded(offer.cost)}
        asked = self.pending.get(arrival.key)
        if asked is None:
            row = self.ledger.answer(job, round, device)
            if row is None:
                raise WireError(f"no assignment of round {round} is known")
            seconds, purpose = max(0.001, time.time() - float(row["sent_at"])), checks.purpose(row["body"])
        else:
            seconds, purpose = asked.seconds(), asked.purpose
        if purpose == "install":
            if arrival.path:
                arrival.path.unlink(missing_ok=True)
            return told, seconds, self.home
        target = self.home / "updates" / job / f"r{round:06d}" / device
        target.parent.mkdir(parents=True, exist_ok=True)
        if arrival.path:
            os.replace(arrival.path, target)
        else:
            _write(target, data)
        return told, seconds, target.parent


def _write(target: Path, data: bytes) -> None:
    """The file's content durably; its name becomes durable with the folder, once for a whole batch."""
    part = target.with_name(f".{target.name}.new")
    with part.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(part, target)
