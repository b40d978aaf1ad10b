"""Transfer: any order, doubles, tears and kills end in the same bytes, or in a refusal."""

import random
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rankfleet.federated.errors import WireError
from rankfleet.federated.wire.messages import Blob
from rankfleet.federated.wire.transfer import Assembly, blob_of, cut, numbers, ranges, read_piece, stored


@given(st.sets(st.integers(0, 300)))
def test_ranges_round_trip(found: set[int]) -> None:
    assert sorted(found) == list(numbers(ranges(found), 301))


def test_hostile_ranges_cost_nothing() -> None:
    assert list(numbers([(-(2**60), 2**60)], 3)) == [0, 1, 2]


@given(st.binary(min_size=1, max_size=2000), st.integers(64, 500), st.integers(0, 99))
@settings(deadline=None, max_examples=50)
def test_any_order_with_doubles(
    tmp_path_factory: pytest.TempPathFactory, data: bytes, packet: int, seed: int
) -> None:
    folder, blob = tmp_path_factory.mktemp("blobs"), blob_of(data, packet)
    assembly = Assembly(folder, blob)
    order = list(range(blob.chunks)) * 2
    random.Random(seed).shuffle(order)
    for number in order:
        prefix, n, piece = read_piece(cut(data, blob, number))
        assert blob.digest.startswith(prefix)
        assembly.add(n, piece)
    assert assembly.complete
    assert assembly.repeated == blob.chunks
    assert assembly.finish().read_bytes() == data
    assert stored(folder, blob.digest)


@given(st.binary(max_size=60))
def test_hostile_pieces(payload: bytes) -> None:
    with pytest.raises(WireError):
        read_piece(payload)


def test_altered_oversized_and_foreign_pieces(tmp_path: Path) -> None:
    data = bytes(range(250))
    blob = blob_of(data, 117)
    altered = bytearray(cut(data, blob, 0))
    altered[-1] ^= 1
    with pytest.raises(WireError, match="corrupted"):
        read_piece(bytes(altered))
    assembly = Assembly(tmp_path, blob)
    for number, piece in ((99, data[:100]), (0, data[:99]), (0, data[:101])):
        with pytest.raises(WireError, match="does not fit"):
            assembly.add(number, piece)


def test_resumes_after_a_kill_and_cuts_a_torn_record(tmp_path: Path) -> None:
    data = random.Random(0).randbytes(1000)
    blob = blob_of(data, 117)
    first = Assembly(tmp_path, blob)
    for n in (0, 4, 2):
        first.add(n, data[n * 100 : n * 100 + 100])
    first.save()
    with first.log.open("ab") as log:
        log.write(b"\0\0\0\5to")
    again = Assembly(tmp_path, blob)
    assert again.resumed == 3
    assert again.missing() == [(1, 2), (3, 4), (5, 10)]
    for n in (1, 3, *range(5, 10)):
        again.add(n, data[n * 100 : n * 100 + 100])
    assert again.finish().read_bytes() == data


def test_a_power_cut_that_kept_the_log_and_lost_a_piece(tmp_path: Path) -> None:
    data = random.Random(0).randbytes(1000)
    blob = blob_of(data, 117)
    first = Assembly(tmp_path, blob)
    for n in range(8):
        first.add(n, data[n * 100 : n * 100 + 100])
    first.save()
    with first.path.open("r+b") as part:
        part.seek(300)
        part.write(bytes(100))
        part.truncate(750)
    again = Assembly(tmp_path, blob)
    assert again.missing() == [(3, 4), (7, 10)]
    first.path.unlink()
    assert Assembly(tmp_path, blob).missing() == [(0, 10)]


def test_wrong_content_starts_over(tmp_path: Path) -> None:
    blob = Blob("ab" * 32, 10, 100)
    assembly = Assembly(tmp_path, blob)
    assembly.add(0, b"0123456789")
    with pytest.raises(WireError, match="another digest"):
        assembly.finish()
    assert assembly.missing() == [(0, 1)]
    (tmp_path / blob.digest).write_bytes(b"damaged on disk")
    assert stored(tmp_path, blob.digest) is None
