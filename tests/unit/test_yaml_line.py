# SPDX-License-Identifier: Apache-2.0
"""Values as one line of YAML: what is written is what is read again, and never endless."""

from __future__ import annotations

from datetime import date
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from dynamo_mpi.parallelism.yaml_line import LONGEST, quoted, shortened, whole, yaml_line

TEXT = st.text(max_size=30) | st.sampled_from(
    ["yes", "Null", "1.0", "0x1F", "~", "<<", "=", "-", "1:30", "_1", "2026-01-31"]
)
SCALAR = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | TEXT
VALUE: st.SearchStrategy[Any] = st.recursive(
    SCALAR, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXT, inner, max_size=4), max_leaves=12
)


def depth(value: object) -> int:
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else None
    return 0 if inner is None else 1 + max(map(depth, inner), default=0)


@given(VALUE.filter(lambda value: depth(value) < 8))
def test_what_is_written_is_read_again(value: object) -> None:
    line = yaml_line(value, 100_000)
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
        ("off", '"off"'),
        ("16", '"16"'),
        ("\x7f\N{GRINNING FACE}", '"\\u007f\\U0001f600"'),
        (1e-05, "1.0e-05"),
        (float("nan"), ".nan"),
        (float("-inf"), "-.inf"),
        (date(2026, 1, 31), '"2026-01-31"'),
        (1 << 2000, "<a very large number>"),
    ],
)
def test_values(value: object, line: str) -> None:
    assert yaml_line(value, 100) == line


def test_what_refers_to_itself_ends() -> None:
    endless: list[object] = []
    endless += [endless] * 9
    assert len(yaml_line(endless, 500)) < 2000
    assert yaml_line(whole(endless), 500) == "<the value that is there>"


@given(VALUE, st.integers(1, 200))
def test_no_line_is_much_longer_than_its_limit(value: object, limit: int) -> None:
    longest_scalar = 1100
    assert len(yaml_line(value, limit)) <= 3 * limit + longest_scalar


def test_short_values_stand_for_themselves() -> None:
    value = {"a": [1, 2]}
    assert whole(value) is value
    assert whole("x" * LONGEST) != "x" * LONGEST


@given(st.text())
def test_quoted_text_is_read_again(text: str) -> None:
    assert yaml.safe_load(quoted(text)) == text


def test_cut_text_is_as_long_as_allowed() -> None:
    assert shortened("abcdefgh", 8) == "abcdefgh"
    assert shortened("abcdefghi", 8) == "abcde..."
