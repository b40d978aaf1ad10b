"""Messages: sealed, versioned, and hostile bytes are a WireError."""

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rankfleet.federated.errors import ConfigError, TooLarge, WireError, WrongVersion
from rankfleet.federated.transport.topics import Topics, checked, device_of, matches
from rankfleet.federated.wire.messages import (
    Blob,
    Envelope,
    Grant,
    Hello,
    Offer,
    Want,
    open_down,
    open_up,
    seal,
    unpack,
)

KEY = b"k" * 32


def test_round_trip() -> None:
    said = Offer("job", 3, Blob("ab" * 32, 10, 5), b"s")
    assert open_up(unpack(seal(said, "nano", KEY)), KEY) == said
    grant = Grant("job", 3, "ab", [(0, 2)])
    assert open_down(unpack(seal(grant, "coordinator", KEY)), KEY) == grant


def test_wrong_key_sender_or_body() -> None:
    data = seal(Want("ab", [(0, 1)]), "nano", KEY)
    with pytest.raises(WireError, match="not sealed"):
        open_up(unpack(data), b"other")
    envelope = unpack(data)
    for changed in ({"sender": "nx"}, {"number": 1}, {"body": b"x"}):
        forged = msgspec.structs.replace(envelope, **changed)
        with pytest.raises(WireError, match="not sealed"):
            open_up(forged, KEY)


def test_wrong_version() -> None:
    old = msgspec.msgpack.encode(Envelope(99, "nano", 1, b"", b""))
    with pytest.raises(WrongVersion, match="speaks protocol 99, this side speaks 1"):
        unpack(old)


def test_a_device_cannot_say_what_only_the_coordinator_says() -> None:
    with pytest.raises(WireError, match="unreadable"):
        open_up(unpack(seal(Grant("j", 0, "d", []), "nano", KEY)), KEY)


@given(st.binary(max_size=300))
def test_hostile_bytes(data: bytes) -> None:
    with pytest.raises(WireError):
        open_up(unpack(data), KEY)


@given(st.binary(max_size=300))
def test_hostile_bodies(data: bytes) -> None:
    from rankfleet.federated.wire.messages import _mac

    envelope = Envelope(1, "nano", 1, data, _mac(KEY, 1, "nano", 1, data))
    try:
        open_up(envelope, KEY)
    except WireError as error:
        assert str(error)


def test_size_limit() -> None:
    with pytest.raises(TooLarge):
        unpack(b"\0" * (1 << 20) + b"\0")


def test_topics() -> None:
    topics = Topics("main")
    assert device_of(topics.device("nano", "up")) == "nano"
    assert device_of("rf/main/dev/../up") == ""
    assert device_of(topics.blob("ab")) == ""
    assert matches(topics.device("+", "up"), topics.device("nano", "up"))
    assert matches("rf/#", "rf/main/x")
    assert not matches("rf/+", "rf/main/x")
    assert not matches("rf/main/x/y", "rf/main/x")
    for bad in ("", "a/b", "+", "#", "a" * 65, ".x", "a b"):
        with pytest.raises(ConfigError, match="not allowed"):
            checked(bad)


def test_hello_carries_only_plain_data() -> None:
    said = Hello({"name": "x"}, [], b"p" * 32)
    assert open_up(unpack(seal(said, "nano", KEY)), KEY) == said
