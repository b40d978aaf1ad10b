"""Uploads: an offer gets a grant when there is room, pieces become a file, a whole and signed file gets a
receipt.

A grant names the missing pieces, so an upload goes on where it stopped, whichever side was killed. At most
`outstanding_mb` and `outstanding_chunks` are under way over the whole fleet: brokers drop silently when
their queues overflow.
"""

import shutil
import time
from collections.abc import Callable
from pathlib import Path

from rankfleet.federated.errors import WireError
from rankfleet.federated.wire.messages import Grant, Offer, Ranges
from rankfleet.federated.wire.transfer import Assembly, read_piece

from ..config import Limits

HOLD_BYTES = 256 << 10
"""Pieces of one update that may be in memory alone."""
STALE_S = 60.0
"""A grant whose device says nothing for so long no longer counts as outstanding."""


class Upload:
    """One update on its way."""

    def __init__(self, device: str, offer: Offer, assembly: Assembly) -> None:
        self.device, self.offer, self.assembly = device, offer, assembly
        self.granted = 0
        self.seen = time.monotonic()
        self.resumed = assembly.resumed


class Uploads:
    """All uploads of a fleet. `done` is called with each complete one, in memory or as a file, and decides
    on the receipt; while there is no `room` in memory it is a file."""

    def __init__(
        self,
        folder: Path,
        limits: Limits,
        grant: Callable[[str, Grant], None],
        done: Callable[[Upload, bytes | Path], None],
        refuse: Callable[[str, Offer, str], None],
        room: Callable[[], bool] = lambda: True,
    ) -> None:
        self.folder, self.limits, self._grant, self._done, self._refuse, self.room = (
            folder,
            limits,
            grant,
            done,
            refuse,
            room,
        )
        self.live: dict[str, Upload] = {}
        self.waiting: list[str] = []
        self.corrupt = 0

    def offer(self, device: str, offer: Offer) -> None:
        """A device wants to send: grant what is missing, queue it, or refuse it for good."""
        blob = offer.blob
        if (
            blob.size > self.limits.update_mb * 1e6
            or blob.chunk < 64
            or blob.size < 1
            or not _hex(blob.digest)
        ):
            self._refuse(
                device,
                offer,
                f"an update of {blob.size:,} bytes in chunks of {blob.chunk}; at most "
                f"{self.limits.update_mb:g} MB are taken",
            )
            return
        upload = self.live.get(device)
        if upload is None or upload.offer.blob != blob:
            for old in (self.folder / device).glob("*"):
                if old.stem != blob.digest:
                    old.unlink(missing_ok=True)
            upload = self.live[device] = Upload(
                device, offer, Assembly(self.folder / device, blob, hold_bytes=HOLD_BYTES)
            )
        else:
            upload.assembly.save()
            upload.resumed = max(upload.resumed, len(upload.assembly.have))
        upload.offer, upload.seen = offer, time.monotonic()
        self._pump(upload)

    def _pump(self, upload: Upload) -> None:
        if upload.assembly.complete:
            self._finish(upload)
            return
        missing = upload.assembly.missing()
        count = sum(stop - start for start, stop in missing)
        chunks, size = self._outstanding(except_for=upload.device)
        if self.full():
            upload.granted = 0  # it offers again, and then there may be room
            return
        free = min(
            self.limits.outstanding_chunks - chunks,
            int((self.limits.outstanding_mb * 1e6 - size) // upload.assembly.blob.chunk),
        )
        if free < 1:
            upload.granted = 0
            if upload.device not in self.waiting:
                self.waiting.append(upload.device)
            return
        upload.granted = min(count, free)
        self._grant(
            upload.device,
            Grant(upload.offer.job, upload.offer.round, upload.assembly.blob.digest, first(missing, free)),
        )

    def _outstanding(self, except_for: str) -> tuple[int, int]:
        now = time.monotonic()
        live = [u for d, u in self.live.items() if d != except_for and now - u.seen < STALE_S]
        return sum(u.granted for u in live), sum(u.granted * u.assembly.blob.chunk for u in live)

    def full(self) -> bool:
        """Is too little room left on the disk to ask for anything?"""
        there = next(p for p in (self.folder, *self.folder.parents) if p.exists())
        return shutil.disk_usage(there).free < self.limits.keep_free_mb * 1e6

    def asked_of(self, device: str) -> bool:
        """Does a piece of it count as granted?"""
        upload = self.live.get(device)
        return upload is not None and upload.granted > 0

    def chunk(self, device: str, payload: bytes) -> None:
        """A piece; one that is torn, foreign or unasked is counted and dropped."""
        upload = self.live.get(device)
        try:
            prefix, number, data = read_piece(payload)
            if upload is None or not upload.assembly.blob.digest.startswith(prefix):
                return
            if upload.assembly.add(number, data):
                upload.granted = max(0, upload.granted - 1)
        except WireError:
            self.corrupt += 1
            return
        upload.seen = time.monotonic()
        if upload.assembly.complete:
            self._finish(upload)
        elif upload.granted == 0:
            self._pump(upload)

    def _finish(self, upload: Upload) -> None:
        try:
            # What came in one go is not written twice; the disk's thread puts it in its place.
            content = (upload.assembly.whole() if self.room() else None) or upload.assembly.finish()
        except WireError:
            self.corrupt += 1
            self._pump(upload)
            return
        self.live.pop(upload.device, None)
        self._done(upload, content)
        while self.waiting:
            next_one = self.live.get(self.waiting.pop(0))
            if next_one is not None:
                self._pump(next_one)
                break

    def save(self) -> None:
        """Bring pieces to disk that wait for the rest of their updates."""
        for upload in self.live.values():
            upload.assembly.save()

    def forget(self, device: str) -> None:
        """The device is gone."""
        self.live.pop(device, None)


def first(missing: Ranges, count: int) -> Ranges:
    """The first `count` numbers of some ranges."""
    cut: Ranges = []
    for start, stop in missing:
        if count <= 0:
            break
        cut.append((start, min(stop, start + count)))
        count -= stop - start
    return cut


def _hex(digest: str) -> bool:
    return len(digest) == 64 and all(c in "0123456789abcdef" for c in digest)
