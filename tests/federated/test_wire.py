"""Frames: what goes in comes out, and hostile bytes are a WireError, never a crash."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hn

from rankfleet.federated.errors import NotFinite, TooLarge, WireError
from rankfleet.federated.wire.frame import DTYPES, decode, encode, freeze, open_frame, save, thaw

arrays = st.sampled_from(sorted(DTYPES.values())).flatmap(
    lambda d: hn.arrays(np.dtype(d), hn.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=5))
)


@given(st.dictionaries(st.text(max_size=20), arrays, max_size=5))
@settings(deadline=None)
def test_round_trip(tensors: dict[str, np.ndarray]) -> None:
    out, meta = decode(encode(tensors, {"n": 1}))
    assert meta == {"n": 1}
    assert list(out) == list(tensors)
    for k, t in tensors.items():
        assert out[k].dtype == t.dtype
        assert out[k].shape == t.shape
        assert out[k].tobytes() == t.tobytes()


@given(st.binary(max_size=200))
def test_hostile_bytes(data: bytes) -> None:
    with pytest.raises(WireError):
        decode(data)


@given(st.data())
@settings(deadline=None)
def test_an_altered_frame_is_refused(data: st.DataObject) -> None:
    frame = bytearray(
        encode({"a": np.arange(5, dtype=np.float32), "b": np.zeros((2, 3), np.int8)}, {"x": [1, 2]})
    )
    at = data.draw(st.integers(0, len(frame) - 1))
    frame[at] ^= data.draw(st.integers(1, 255))
    with pytest.raises(WireError):
        decode(bytes(frame))


@pytest.mark.parametrize("cut", [0, 3, 11, 12, 30, -1])
def test_a_torn_frame_is_refused(cut: int) -> None:
    with pytest.raises(WireError):
        decode(encode({"a": np.arange(9.0)})[:cut])


def forged(header: bytes, payload: bytes = b"") -> bytes:
    import struct
    import zlib

    body = struct.pack("<I", len(header)) + header + payload
    return b"RFT1" + struct.pack("<I", zlib.crc32(body)) + body


@pytest.mark.parametrize(
    "rows",
    [
        [["a", "f32", [2**40, 2**40]]],
        [["a", "f32", [-1]]],
        [["a", "object", [1]]],
        [["a", "f32", [1]], ["a", "f32", [1]]],
        [["a", "f32", [1] * 9]],
        [["x" * 600, "f32", [1]]],
    ],
)
def test_forged_headers(rows: list[object]) -> None:
    import msgspec

    with pytest.raises(WireError):
        decode(forged(msgspec.msgpack.encode([rows, None]), b"\0" * 8))


def test_limits_and_finiteness() -> None:
    with pytest.raises(TooLarge):
        decode(encode({"a": np.zeros(100)}), limit=100)
    with pytest.raises(NotFinite, match="`a`"):
        decode(encode({"a": np.array([1.0, np.nan], np.float32)}), finite=True)
    with pytest.raises(WireError, match="does not travel"):
        encode({"a": np.zeros(2, bool)})


def test_state_survives_with_nested_arrays() -> None:
    state = {
        "m": {"a.A": np.eye(2, dtype=np.float32)},
        "n": 3,
        "list": [1.5, {"b": np.arange(3)}],
        "none": None,
        "s": np.float64(2),
    }
    back = thaw(freeze(state))
    assert back["n"] == 3
    assert back["s"] == 2.0
    assert np.array_equal(back["m"]["a.A"], np.eye(2))
    assert np.array_equal(back["list"][1]["b"], np.arange(3))
    back["m"]["a.A"][0, 0] = 5


def test_frames_on_disk_are_mapped(tmp_path: Path) -> None:
    save(tmp_path / "f", {"a": np.arange(1000, dtype=np.float32)}, [1])
    out, meta = open_frame(tmp_path / "f")
    assert meta == [1]
    assert np.array_equal(out["a"], np.arange(1000))
    assert [p.name for p in tmp_path.iterdir()] == ["f"]
