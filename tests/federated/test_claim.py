"""Claim tokens: what is printed is what is read, anything else is one clear error."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rankfleet.federated.errors import ConfigError
from rankfleet.federated.trust.claim import Claim, link_key, read_claim, write_claim

CLAIM = Claim("main", "nano", "mqtt://h:1883", b"s" * 32, b"p" * 32)


def test_round_trip_and_keys() -> None:
    assert read_claim(f"  {write_claim(CLAIM)}\n") == CLAIM
    assert link_key(CLAIM) != link_key(Claim("main", "nx", "mqtt://h:1883", b"s" * 32, b"p" * 32))
    assert b"s" * 32 not in link_key(CLAIM)


@given(st.text(max_size=80))
def test_any_other_text(text: str) -> None:
    for token in (text, f"rf1.{text}"):
        with pytest.raises(ConfigError):
            read_claim(token)


def test_a_device_name_that_could_leave_its_folder() -> None:
    with pytest.raises(ConfigError, match="not allowed"):
        read_claim(write_claim(Claim("main", "../x", "mqtt://h", b"", b"")))
