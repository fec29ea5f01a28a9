# SPDX-License-Identifier: Apache-2.0
"""Values as one line of YAML: what is written is what is read again, and never endless."""

from __future__ import annotations

from datetime import date, datetime
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from dynamo_mpi.layout.engine_yaml import LONGEST, short_line, shortened, whole, yaml_line

TEXT = st.text(max_size=30) | st.sampled_from(
    ["yes", "Null", "1.0", "0x1F", "~", "<<", "=", "-", "1:30", "_1", "2026-01-31"]
)
SCALAR = (
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.binary(max_size=80) | st.dates() | TEXT
)
VALUE: st.SearchStrategy[Any] = st.recursive(
    SCALAR, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXT, inner, max_size=4), max_leaves=12
)


@given(VALUE)
def test_what_is_written_is_read_again(value: object) -> None:
    line = yaml_line(value)
    assert "\n" not in line
    assert line.isascii()
    assert line.isprintable()
    assert yaml.safe_load(line) == value


@pytest.mark.parametrize(
    ("value", "line"),
    [
        ({"backend": "UCX", "sizes": [1, 2]}, "{backend: UCX, sizes: [1, 2]}"),
        ({}, "{}"),
        (("a", "/b/c.yaml"), "[a, /b/c.yaml]"),
        ("off", "'off'"),
        ("16", "'16'"),
        ("\x7f\N{GRINNING FACE}", '"\\x7F\\U0001F600"'),
        (1e-05, "1.0e-05"),
        (float("nan"), ".nan"),
        (float("-inf"), "-.inf"),
        (date(2026, 1, 31), "2026-01-31"),
        ("a\nb", '"a\\nb"'),
        (
            b"a" * 60,
            '!!binary "YWFhYWFhYWFhYWFhYWFhYWFhYWFhYWFhYWFhYWFhYWFhYWFhYWFhYWFhYWFhYWFhYWFhYWFhYWFh\\nYWFh\\n"',
        ),
        (datetime(2026, 1, 31, 1, 2), "!!timestamp '2026-01-31 01:02:00'"),
        (10**999, "1" + "0" * 999),
    ],
)
def test_values(value: object, line: str) -> None:
    assert yaml_line(value) == line


def test_aliases_are_written_out() -> None:
    """Lines that are pasted into one file must not define the same anchor twice."""
    shared = [1]
    assert yaml_line({"a": shared, "b": shared}) == "{a: [1], b: [1]}"


def test_what_refers_to_itself_or_grows_without_bounds_is_described() -> None:
    endless: list[object] = []
    endless += [endless] * 9
    bomb: object = "x"
    for _ in range(40):
        bomb = [bomb] * 9
    deep: object = "x"
    for _ in range(LONGEST // 2):
        deep = [deep]
    for value in (endless, bomb, deep, list(range(LONGEST))):
        assert short_line(value, 60) == "<a value too long to be shown>"
        assert whole(value) == "<the value that is there>"


@given(VALUE, st.integers(4, 200))
def test_no_line_is_longer_than_its_limit(value: object, limit: int) -> None:
    assert len(short_line(value, limit)) <= limit


def test_short_values_stand_for_themselves() -> None:
    value = {"a": [1, 2]}
    assert whole(value) is value
    assert whole("x" * LONGEST) != "x" * LONGEST


def test_cut_text_is_as_long_as_allowed() -> None:
    assert shortened("abcdefgh", 8) == "abcdefgh"
    assert shortened("abcdefghi", 8) == "abcde..."
