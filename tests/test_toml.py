"""Files and overrides become tables; whatever is wrong with one is a ConfigError that says where and what to do."""

from __future__ import annotations

import math
import tomllib
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aiorl.errors import ConfigError, Fault
from aiorl.toml import literal, parse_file, parse_override, put

if TYPE_CHECKING:
    from pathlib import Path

scalars = st.one_of(
    st.booleans(), st.integers(-(2**63), 2**63 - 1), st.floats(allow_nan=False), st.text(st.characters(codec="utf-8"))
)
values = st.recursive(
    scalars, lambda inner: st.lists(inner) | st.dictionaries(st.text(st.characters(codec="utf-8")), inner)
)


@settings(deadline=None)
@given(values)
def test_a_literal_reads_as_its_value(value: Any) -> None:
    assert tomllib.loads(f"x = {literal(value)}") == {"x": value}


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, '"none"'),
        (math.inf, "inf"),
        (1e-5, "1e-05"),
        ((1, 2), "[1, 2]"),
        ({"a": {"b": []}}, "{ a = { b = [] } }"),
    ],
)
def test_literals(value: object, text: str) -> None:
    assert literal(value) == text


@pytest.mark.parametrize(
    ("text", "path", "value"),
    [
        ("trainer.seed=1", "trainer.seed", 1),
        ("a.b = 1e-3", "a.b", 0.001),
        ("a=true", "a", True),
        ("a=True", "a", "True"),
        ("a=fast", "a", "fast"),
        ("a=two words", "a", "two words"),
        ("a='fast'", "a", "fast"),
        ('a="x=y"', "a", "x=y"),
        ("a=x=y", "a", "x=y"),
        ("a=runs/x.toml", "a", "runs/x.toml"),
        ("a=module:Name", "a", "module:Name"),
        ("a=[1, 2]", "a", [1, 2]),
        ("a={ b = 1 }", "a", {"b": 1}),
        ("a=none", "a", "none"),
        ("a=inf", "a", math.inf),
        ('a."b c".d=1', "a/b c/d", 1),
        ("a=1\nb=2", "a", "1\nb=2"),
    ],
)
def test_overrides(text: str, path: str, value: object) -> None:
    steps, parsed = parse_override(text)
    assert (steps, parsed) == (path.split("/") if "/" in path else path.split("."), value)


@pytest.mark.parametrize("text", ["", "=", "=1", "a", "a.=1", "a..b=1", "a b=1", "a\n=1"])
def test_an_override_without_a_path_is_refused(text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_override(text)
    remedy = "write KEY=VALUE, as in trainer.seed=1"
    assert caught.value.faults == (Fault(text, "is no override", remedy=remedy, source="--set"),)


@pytest.mark.parametrize("value", ["", " ", "[1, 2", "{ a = ", '"open', "'open"])
def test_an_override_whose_value_does_not_end_is_refused(value: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_override(f"a.b={value}")
    (fault,) = caught.value.faults
    assert (fault.path, fault.message, fault.value, fault.source) == ("a.b", "is no TOML value", value, "--set")


def test_values_are_put_into_tables_that_are_made() -> None:
    table: dict[str, Any] = {"a": {"b": 1}}
    put(table, ["a", "c", "d"], 2, "here")
    put(table, ["a", "b"], 3, "here")
    assert table == {"a": {"b": 3, "c": {"d": 2}}}
    with pytest.raises(ConfigError) as caught:
        put(table, ["a", "b", "x", "y"], 4, "here")
    assert caught.value.faults == (Fault("a.b.x.y", "is below a.b, which is no table", "4", "set a.b itself", "here"),)


def fault_of(path: Path) -> Fault:
    with pytest.raises(ConfigError) as caught:
        parse_file(path)
    (fault,) = caught.value.faults
    assert fault.path == str(path)
    return fault


def test_a_file_that_is_missing_is_likened_to_its_neighbours(tmp_path: Path) -> None:
    assert fault_of(tmp_path / "cartpol.toml").remedy == ""
    (tmp_path / "cartpole.toml").touch()
    fault = fault_of(tmp_path / "cartpol.toml")
    assert (fault.message, fault.remedy) == ("does not exist", 'did you mean "cartpole.toml"?')
    assert fault_of(tmp_path / "nowhere" / "x.toml").message == "does not exist"


def test_a_file_that_cannot_be_read_says_why(tmp_path: Path) -> None:
    path = tmp_path / "x.toml"
    assert fault_of(tmp_path).message == "is a folder"
    path.write_bytes(b"a = '\xff'")
    assert fault_of(path).message == "is not UTF-8 (byte 5)"
    path.write_text("a = 1\nb =\n")
    assert fault_of(path).message.startswith("is not valid TOML: Invalid value (at line 2")
    path.write_text("a = 1\na = 2\n")
    assert "is not valid TOML: Cannot overwrite a value" in fault_of(path).message
    assert fault_of(path / "below.toml").message == "cannot be read: Not a directory"


def test_a_byte_order_mark_is_no_fault(tmp_path: Path) -> None:
    path = tmp_path / "x.toml"
    path.write_bytes(b"\xef\xbb\xbfa = 1\n")
    assert parse_file(path) == {"a": 1}
