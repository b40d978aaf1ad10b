"""Uploads: grants stay within the limits, the rest waits its turn, stale pieces and grants do no harm."""

from pathlib import Path
from typing import Any

import pytest

from rankfleet.coordinator.config import Limits
from rankfleet.coordinator.exchange.uploads import Upload, Uploads, first
from rankfleet.federated.wire.messages import Grant, Offer
from rankfleet.federated.wire.transfer import blob_of, cut, numbers


class Desk:
    """An `Uploads` with its answers written down."""

    def __init__(self, folder: Path, **limits: Any) -> None:
        self.room = True
        self.content: list[bytes | Path] = []
        self.grants: list[tuple[str, Grant]] = []
        self.done: list[str] = []
        self.refused: list[str] = []
        self.uploads = Uploads(
            folder,
            Limits(**limits),
            lambda d, g: self.grants.append((d, g)),
            self._done,
            lambda d, o, reason: self.refused.append(reason),
            lambda: self.room,
        )

    def _done(self, upload: Upload, content: bytes | Path) -> None:
        self.done.append(upload.device)
        self.content.append(content)

    def offer(self, device: str, data: bytes, packet: int = 1017) -> Any:
        blob = blob_of(data, packet)
        self.uploads.offer(device, Offer("j", 0, blob, b""))
        return blob


def test_grants_never_exceed_the_chunks_allowed(tmp_path: Path) -> None:
    desk = Desk(tmp_path, outstanding_chunks=5)
    data = {d: d.encode() * 4000 for d in "abc"}
    blobs = {d: desk.offer(d, t) for d, t in data.items()}
    assert [(d, sum(b - a for a, b in g.missing)) for d, g in desk.grants] == [("a", 4), ("b", 1)]
    for device, grant in desk.grants:
        for n in numbers(grant.missing, 99):
            desk.uploads.chunk(device, cut(data[device], blobs[device], n))
    while len(desk.done) < 3:
        device, grant = desk.grants[-1]
        for n in numbers(grant.missing, 99):
            desk.uploads.chunk(device, cut(data[device], blobs[device], n))
    assert sorted(desk.done) == ["a", "b", "c"]


def test_pieces_nobody_asked_for_are_dropped(tmp_path: Path) -> None:
    desk = Desk(tmp_path)
    blob = desk.offer("a", b"x" * 3000)
    desk.uploads.chunk("ghost", cut(b"x" * 3000, blob, 0))
    desk.uploads.chunk("a", b"rubbish that is long enough")
    foreign = blob_of(b"y" * 3000, 1017)
    desk.uploads.chunk("a", cut(b"y" * 3000, foreign, 0))
    assert desk.uploads.live["a"].assembly.have == set()
    assert desk.uploads.corrupt == 1


def test_reordered_doubled_and_corrupted_pieces(tmp_path: Path) -> None:
    desk = Desk(tmp_path)
    data = bytes(range(256)) * 20
    blob = desk.offer("a", data)
    bad = bytearray(cut(data, blob, 1))
    bad[-1] ^= 255
    for n in (4, 4, 0, 3):
        desk.uploads.chunk("a", cut(data, blob, n))
    desk.uploads.chunk("a", bytes(bad))
    assert desk.done == []
    for n in (5, 2, 1):
        desk.uploads.chunk("a", cut(data, blob, n))
    assert desk.done == ["a"]
    assert desk.uploads.corrupt == 1


@pytest.mark.parametrize(("room", "saved"), [(True, False), (True, True), (False, False)])
def test_what_came_in_one_go_stays_in_memory(tmp_path: Path, room: bool, saved: bool) -> None:
    desk = Desk(tmp_path)
    desk.room = room
    data = bytes(range(256)) * 20
    blob = desk.offer("a", data)
    for n in range(blob.chunks):
        desk.uploads.chunk("a", cut(data, blob, n))
        if saved and n == 2:
            desk.uploads.save()
    (content,) = desk.content
    if room and not saved:
        assert content == data
        assert not list((tmp_path / "a").iterdir())
    else:
        assert isinstance(content, Path)
        assert content.read_bytes() == data


def test_a_whole_upload_of_another_digest_starts_over(tmp_path: Path) -> None:
    desk = Desk(tmp_path)
    blob = desk.offer("a", b"x" * 2500)
    for n in range(blob.chunks):
        desk.uploads.chunk("a", cut(b"y" * 2500, blob, n))
    assert desk.done == []
    assert desk.uploads.corrupt == 1
    assert desk.grants[-1][1].missing == [(0, blob.chunks)]


def test_an_offer_after_a_kill_is_granted_only_what_is_missing(tmp_path: Path) -> None:
    data = b"z" * 5000
    desk = Desk(tmp_path)
    blob = desk.offer("a", data)
    desk.uploads.chunk("a", cut(data, blob, 2))
    desk.uploads.save()
    again = Desk(tmp_path)
    again.offer("a", data)
    assert again.grants[0][1].missing == [(0, 2), (3, 5)]
    assert again.uploads.live["a"].resumed == 1


def test_absurd_offers_are_refused(tmp_path: Path) -> None:
    from rankfleet.federated.wire.messages import Blob

    desk = Desk(tmp_path, update_mb=1)
    for blob in (
        Blob("ab" * 32, 2_000_000, 1000),
        Blob("../../etc", 100, 1000),
        Blob("ab" * 32, 100, 1),
        Blob("ab" * 32, 0, 1000),
    ):
        desk.uploads.offer("a", Offer("j", 0, blob, b""))
    assert len(desk.refused) == 4
    assert not desk.uploads.live


def test_first() -> None:
    assert first([(0, 3), (5, 9)], 4) == [(0, 3), (5, 6)]
    assert first([(0, 3)], 0) == []
