# SPDX-License-Identifier: Apache-2.0
"""Configs as people write them, and as they shouldn't: each is read, or refused with its path, and nothing else happens."""

from __future__ import annotations

import json
import math
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from dynamo_mpi.common import config_reader
from dynamo_mpi.common.config_reader import MAX_BYTES, MAX_SIZE, ConfigReader, parse_json, parse_yaml, read_small_text
from dynamo_mpi.common.errors import ConfigFileError

PATH = "/some/where.cfg"
NEEDED = "something better"
LAUGHS = "\n".join(["a0: &a0 [ha, ha]", *(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 10))])


def from_json(text: str) -> dict[str, Any]:
    return parse_json(text, PATH, NEEDED)


def from_yaml(text: str) -> dict[str, Any]:
    return parse_yaml(text, PATH, NEEDED)


def refused(parse: Callable[[str], object], text: str) -> ConfigFileError:
    with pytest.raises(ConfigFileError) as caught:
        parse(text)
    assert PATH in caught.value.problem
    assert "\n" not in caught.value.problem
    assert len(caught.value.problem) < 1000
    return caught.value


# JSON


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "is not JSON"),
        ("[]", "holds a list"),
        ("7", "holds a int"),
        ("null", "holds a NoneType"),
        ('"{}"', "holds a str"),
        ("{'a': 1}", "is not JSON"),
        ('{"a": 1,}', "is not JSON"),
        ('{"a": 1} {"b": 2}', "is not JSON"),
        ('\ufeff{"a": 1}', "is not JSON"),
        ('{"a": 1, "b": 2, "a": 3}', "the key 'a' twice"),
        ('{"b": {"c": [{"d": 1, "d": 1}]}}', "the key 'd' twice"),
        ('{"\\u0061": 1, "a": 1}', "the key 'a' twice"),
        (f'{{"{"k" * 500}": 1, "{"k" * 500}": 1}}', "the key 'kkkk"),
        ("[" * 200_000, "is not JSON"),
        ('{"a":' * 200_000, "is not JSON"),
        ('{"a": 1' + "0" * 5000 + "}", "is not JSON"),
    ],
    ids=lambda value: ascii(value)[:24],
)
def test_what_is_no_json_object_is_refused(text: str, words: str) -> None:
    assert words in refused(from_json, text).problem


def test_json_that_transformers_writes_is_read() -> None:
    """GLM's and Llama's configs have had Infinity and NaN in them, which are Python's JSON alone."""
    found = from_json('{"time_step_limit": [0.0, Infinity], "x": NaN, "y": -Infinity, "a": {"b": 1}, "c": {"b": 2}}')
    assert found["time_step_limit"] == [0.0, math.inf]
    assert math.isnan(found["x"])
    assert (found["a"], found["c"]) == ({"b": 1}, {"b": 2})


def test_a_duplicate_in_a_large_object_is_found_at_once() -> None:
    keys = ", ".join(f'"{number}": 0' for number in range(200_000))
    assert "the key '199999' twice" in refused(from_json, f'{{{keys}, "199999": 0}}').problem


# YAML


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a: 1\nb: 2\na: 3", "line 3: the key 'a' is a duplicate"),
        ("a:\n  b: 1\n  c: 2\n  b: 1", "line 4: the key 'b'"),
        ("a: {b: 1, b: 1}", "line 1: the key 'b'"),
        ("- {b: 1, b: 1}", "line 1: the key 'b'"),
        ("'a': 1\n\"a\": 2", "line 2: the key 'a'"),
        ("1: a\n1: b", "line 2: the key '1'"),
        ("x: &x {a: 1, a: 2}\ny: *x", "line 1: the key 'a'"),
        (f"{'k' * 100}: 1\n{'k' * 100}: 1", "line 2: the key 'kkkk"),
        ("a: &a [1, *a]", "contains itself"),
        ("a: &a {b: *a}", "contains itself"),
        ("&top\na: {b: *top}", "contains itself"),
        ("a: &a\n  b: &b\n    c: *a", "a value contains itself"),
        (LAUGHS, "too large or too deeply nested"),
        ("\n".join(f"{' ' * depth}a:" for depth in range(120)), "too large or too deeply nested"),
        ("a: " + "[" * 120 + "]" * 120, "too large or too deeply nested"),
        ("[" * 100_000, "is not YAML"),
        ("{a: " * 100_000, "is not YAML"),
        ("a: 1" + "0" * 5000, "a number of 5001 characters"),
        ("a:\n- 0x" + "f" * 5000, "line 2: a number of 5002 characters"),
        ("a: 1" + ":00" * 3000, "a number of 9001 characters"),
        ("0x" + "f" * 1010 + ": a", "a number of 1012 characters"),
        ("a: !!int ''", "doesn't fit its tag"),
        ("a: !!float ''", "doesn't fit its tag"),
        ("a: !!bool perhaps", "doesn't fit its tag"),
        ("a: !!timestamp later", "doesn't fit its tag"),
        ("a: !!binary x", "is not YAML"),
        ("a: !!python/name:os.system", "is not YAML"),
        ("a: !engine b", "is not YAML"),
        ("a: 2026-02-30", "is not YAML"),
        ("a: \ud800", "is not YAML"),
        ("? [a]\n: b", "is not YAML"),
        ("? {a: b}\n: c", "is not YAML"),
        ("<<: 3\na: 1", "is not YAML"),
        ("!!set {a, b}", "holds a set"),
        ("a: 1\n...\nb: 2", "is not YAML"),
        ("%YAML 3.0\n---\na: 1", "is not YAML"),
        ("a: \x07", "is not YAML"),
    ],
    ids=lambda value: ascii(value)[:24],
)
def test_what_is_no_sound_yaml_mapping_is_refused(text: str, words: str) -> None:
    assert words in refused(from_yaml, text).problem


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("a: 1", {"a": 1}),
        ("\ufeffa: 1", {"a": 1}),
        ("---\na: 1\n...\n", {"a": 1}),
        ('{"a": 1}', {"a": 1}),
        ("a: 1\r\nb: 2\r\n", {"a": 1, "b": 2}),
        ("a: &x [1, 2]\nb: *x\nc: *x", {"a": [1, 2], "b": [1, 2], "c": [1, 2]}),
        # merge keys: what stands there itself counts, and of several the first
        ("x: &x {a: 1, b: 2}\ny:\n  <<: *x\n  b: 3", {"x": {"a": 1, "b": 2}, "y": {"a": 1, "b": 3}}),
        (
            "x: &x {a: 1}\ny: &y {a: 2, b: 2}\nz: {<<: [*x, *y]}",
            {"x": {"a": 1}, "y": {"a": 2, "b": 2}, "z": {"a": 1, "b": 2}},
        ),
        ("x: &x {a: 1}\nz: {<<: *x, <<: *x}", {"x": {"a": 1}, "z": {"a": 1}}),
        ("a: {b: 1}\nc: {b: 1}", {"a": {"b": 1}, "c": {"b": 1}}),
        ("a: .inf", {"a": math.inf}),
        ("a: null\nb: ~\nc:", {"a": None, "b": None, "c": None}),
        ("1: a\n'1': b", {1: "a", "1": "b"}),
        ("a: yes\nb: off", {"a": True, "b": False}),
        ("a: " + "[" * 90 + "]" * 90, None),
        ("a: 1" + "0" * 900, {"a": 10**900}),
    ],
    ids=lambda value: ascii(value)[:24],
)
def test_sound_yaml_is_read(text: str, found: dict[str, Any] | None) -> None:
    loaded = from_yaml(text)
    assert found is None or loaded == found


@pytest.mark.parametrize("text", ["", "# nothing", "---", "~", "null", "--- null\n..."])
def test_an_empty_document_is_distinguished(text: str) -> None:
    assert "is empty" in refused(from_yaml, text).problem


@pytest.mark.parametrize("name", ["CSafeLoader", "SafeLoader"])
def test_with_and_without_libyaml(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if name == "SafeLoader":
        monkeypatch.delattr(yaml, "CSafeLoader", raising=False)
    assert from_yaml("a: 1\nb: [x]") == {"a": 1, "b": ["x"]}
    for text in ("a: \0", "a: 1\na: 2", LAUGHS, "a: [", "a: \ud800", "a: &a [*a]", "a: !!bool x", "[" * 5000):
        refused(from_yaml, text)


WORDS = st.sampled_from(
    [
        *(
            "a",
            "b",
            ":",
            ": ",
            "- ",
            "\n",
            "\n  ",
            "[",
            "]",
            "{",
            "}",
            ", ",
            "&x ",
            "*x",
            "<<: ",
            "? ",
            "|",
            ">",
            "'",
            '"',
        ),
        *("!!int ", "!!float ", "!!bool ", "!!set ", "!!omap ", "!!pairs ", "!!binary ", "!!timestamp ", "!!null "),
        *(
            "!!str ",
            "!!map ",
            "!!seq ",
            "!!merge ",
            "! ",
            "1",
            "-",
            "0x",
            "0b",
            "0o",
            "_",
            ".",
            "e9",
            ".inf",
            "1:0",
            "~",
        ),
        *(
            "2026-01-01",
            "T",
            "Z",
            "---",
            "...",
            "%YAML 1.1",
            "#",
            "\t",
            "\\",
            "true",
            "null",
            "=",
            "\ufeff",
            "é",
            "\x85",
        ),
    ]
)


@settings(max_examples=400)
@given(st.lists(WORDS, max_size=14).map("".join) | st.text(max_size=40))
def test_any_yaml_is_a_mapping_or_refused(text: str) -> None:
    try:
        assert isinstance(from_yaml(text), dict)
    except ConfigFileError as error:
        assert PATH in error.problem


@settings(max_examples=200)
@given(
    st.text(max_size=40)
    | st.lists(st.sampled_from([*'{}[]:,"\\u0', "NaN", "1e9", "-", "true", '"a"', " "]), max_size=20).map("".join)
)
def test_any_json_is_an_object_or_refused(text: str) -> None:
    try:
        assert isinstance(from_json(text), dict)
    except ConfigFileError as error:
        assert PATH in error.problem


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=150)
@given(st.dictionaries(st.text(max_size=6), VALUES, max_size=4))
def test_what_was_written_is_read_back(values: dict[str, Any]) -> None:
    assert from_json(json.dumps(values)) == values
    if values:
        assert from_yaml(yaml.safe_dump(values)) == values


# files


def test_a_file_is_read_as_utf_8(tmp_path: Path) -> None:
    file = tmp_path / "x"
    file.write_bytes("ä\r\n".encode())
    assert read_small_text(file) == "ä\r\n"
    file.write_bytes(b"")
    assert read_small_text(file) == ""


@pytest.mark.parametrize("data", [b"a\xff", b"\xff\xfea\0", b"\x80", "ä".encode("latin-1"), b"a" * 100 + b"\xc3"])
def test_bytes_that_are_no_text_are_refused(data: bytes, tmp_path: Path) -> None:
    file = tmp_path / "x"
    file.write_bytes(data)
    with pytest.raises(ConfigFileError, match=r"is not text: .* at byte \d+") as caught:
        read_small_text(file)
    assert str(file) in caught.value.problem


def test_weights_in_place_of_a_config_are_not_read(tmp_path: Path) -> None:
    file = tmp_path / "x"
    with file.open("wb") as stream:
        stream.truncate(2**40)
    with pytest.raises(ConfigFileError, match="is larger than 8 MiB"):
        read_small_text(file)
    file.write_bytes(b" " * MAX_BYTES)
    assert len(read_small_text(file)) == MAX_BYTES


def test_a_pipe_that_is_written_to_is_read_to_its_end(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    # more than a pipe holds at once
    content = "a: " + "x" * 200_000

    def write() -> None:
        pipe.write_text(content)

    writer = threading.Thread(target=write)
    writer.start()
    try:
        assert read_small_text(pipe) == content
    finally:
        writer.join()


def test_a_pipe_without_a_writer_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert config_reader._PIPE_SECONDS == 5
    monkeypatch.setattr(config_reader, "_PIPE_SECONDS", 0.05)
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with pytest.raises(ConfigFileError, match=f"nothing was written to the pipe {pipe} within 0.05 s"):
        read_small_text(pipe)
    # nor does one help who holds it open and says nothing
    holder = os.open(pipe, os.O_RDWR)
    try:
        with pytest.raises(ConfigFileError, match="nothing was written"):
            read_small_text(pipe)
    finally:
        os.close(holder)


@pytest.mark.parametrize("text", ["", "# nothing", "---", "null"])
def test_where_it_may_be_empty_nothing_is_no_key(text: str) -> None:
    assert parse_yaml(text, PATH, NEEDED, may_be_empty=True) == {}
    assert "is empty" in refused(from_yaml, text).problem


def test_what_cannot_be_opened_is_the_caller_s_matter(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        read_small_text(tmp_path / "nothing")
    with pytest.raises(IsADirectoryError):
        read_small_text(tmp_path)


# typed values


def reader(**values: Any) -> ConfigReader:
    return ConfigReader(values, PATH)


@pytest.mark.parametrize("value", [0, -1, True, 1.0, "1", [1], {}, MAX_SIZE + 1, 10**1000])
def test_a_size_is_a_positive_whole_number(value: Any) -> None:
    with pytest.raises(ConfigFileError, match=f"^{PATH}: a is "):
        reader(a=value).size("a")


def test_the_first_key_with_a_value_counts() -> None:
    assert reader(a=None, b=2, c=3).size("a", "b", "c") == 2
    assert reader(c=3).size("a", "b") is None
    assert reader(a=0).size("a", minimum=0) == 0
    assert reader(a=MAX_SIZE).size("a") == MAX_SIZE
    with pytest.raises(ConfigFileError) as caught:
        reader(a=9).size("a", maximum=8)
    assert caught.value.expected == "a positive whole number, at most 8"


@pytest.mark.parametrize("value", ["1", True, [], {}, math.nan, math.inf, -math.inf, 1e301, -(10**301), 10**400])
def test_a_number_is_finite(value: Any) -> None:
    with pytest.raises(ConfigFileError, match="a is ") as caught:
        reader(a=value).number("a")
    assert caught.value.expected == "a number"


@pytest.mark.parametrize("value", [1, 0, -1.5, 2, 1e299, -(2**80)])
def test_the_range_of_a_number_is_for_a_rule_to_judge(value: float) -> None:
    found = reader(a=value).number("a")
    assert (found, type(found)) == (value, float)
    assert reader(a=None).number("a") is reader().number("a") is None


@pytest.mark.parametrize("value", [0, 1, "true", [], 1.0])
def test_a_switch_is_true_or_false(value: Any) -> None:
    with pytest.raises(ConfigFileError, match="a is "):
        reader(a=value).switch("a")
    assert reader(a=False).switch("a") is False
    assert reader(a=None).switch("a") is None


@pytest.mark.parametrize("value", [0, True, ["x"], {}])
def test_a_text_is_a_text(value: Any) -> None:
    with pytest.raises(ConfigFileError, match="a is "):
        reader(a=value).text("a")
    assert reader(a="").text("a") == ""


@pytest.mark.parametrize("value", [1, "1,2", [0], [True], [1.0], [None], [MAX_SIZE + 1], {"1": 1}])
def test_a_list_of_sizes(value: Any) -> None:
    with pytest.raises(ConfigFileError, match="a is "):
        reader(a=value).sizes("a")
    assert reader(a=[]).sizes("a") == ()
    assert reader(a=[3, 1]).sizes("a") == (3, 1)
    assert reader(a=[0]).sizes("a", minimum=0) == (0,)


def test_sections_keep_the_path() -> None:
    inner = reader(a={"b": {"c": 0}}).section("a").section("b")
    with pytest.raises(ConfigFileError, match=f"^{PATH}: a.b.c is 0"):
        inner.size("c")
    assert reader().section("a").values == {}
    assert not reader(a=None).has("a")
    with pytest.raises(ConfigFileError) as caught:
        reader(a=["x" * 500]).section("a")
    assert len(caught.value.problem) < 100
