"""YAML: one clear error with line and nearest key for everything that cannot be meant."""

from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rankfleet.federated.errors import ConfigError
from rankfleet.federated.program.loader import load, loads, parse


class Inner(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    rate: float = 0.1


class Outer(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    name: str = "x"
    inner: Inner = Inner()
    many: tuple[Inner, ...] = ()
    flag: bool = False


def test_numbers_are_those_of_yaml_1_2() -> None:
    assert parse("a: 1e-3\nb: 0x10\nc: 0o17\nd: on\ne: 010\nf: .5\ng: '1'\nh: ~\ni: -3")[0] == {
        "a": 0.001,
        "b": 16,
        "c": 15,
        "d": "on",
        "e": 10,
        "f": 0.5,
        "g": "1",
        "h": None,
        "i": -3,
    }


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("inner:\n  rat: 1.0\n", r"line 2 \(`inner.rat`\): unknown key `rat`\n  try: did you mean `rate`\?"),
        ("name: a\nname: b", "line 2: `name` is set twice"),
        ("inner: &x {rate: 1}\nmany: [*x]", r"line 2: aliases \(`\*x`\) are not allowed"),
        ("inner:\n  rate: .nan", "line 2: `.nan` is not a finite number"),
        ("inner:\n  rate: .inf", "not a finite number"),
        ("many:\n  - rate: 1\n  - rate: fast\n", "line 3 .*many.1.rate.*Expected `float`, got `str`"),
        ("flag: yes", "Expected `bool`, got `str`"),
        ("name: [", "line 1"),
        ("[1, 2]", "Expected `object`, got `array`"),
        ("? [a]\n: 1", "a key must be a word"),
        ("\x00", "text"),
    ],
)
def test_errors(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        loads(text, Outer)


def test_size_and_missing_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="at most 1,000,000"):
        loads("a" * 1_000_001, Outer)
    with pytest.raises(ConfigError, match="No such file"):
        load(tmp_path / "none.yaml", Outer)
    (tmp_path / "latin").write_bytes(b"name: \xe4")
    with pytest.raises(ConfigError, match="not UTF-8"):
        load(tmp_path / "latin", Outer)


@given(st.text(max_size=100))
def test_any_text_is_data_or_a_config_error(text: str) -> None:
    try:
        loads(text, Outer)
    except ConfigError as error:
        assert str(error)
