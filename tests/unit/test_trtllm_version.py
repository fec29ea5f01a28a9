# SPDX-License-Identifier: Apache-2.0
"""TensorRT-LLM's versions: their order, what isn't one, and the one that is installed."""

from __future__ import annotations

import subprocess
import sys
from contextlib import suppress
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dynamo_mpi.common.errors import UsageError
from dynamo_mpi.layout.trtllm_version import TrtllmVersion, installed_trtllm_version, parse_trtllm_version

ROOT = Path(__file__).parents[2]

ASCENDING = (
    "0.21.0",
    "1.0.0.dev2025071500",
    "1.0.0a1",
    "1.0.0b2",
    "1.0.0rc1.dev3",
    "1.0.0rc1",
    "1.0.0rc6",
    "1.0",
    "1.0.0.post1",
    "1.1.0rc2",
    "1.2.0rc2",
    "1.2.0rc2.post1",
    "1.2.0rc10",
    "1.2.0",
    "1.2.1",
    "1.3.0rc9",
    "1.3.0rc22",
    "1.3.0",
    "1.10.0",
    "2.0",
)

NONE = [
    "",
    " ",
    "1",
    "one",
    "1.",
    "1..2",
    "1.2.1 or so",
    "v",
    "1.2.1+",
    "1.2.1rc1rc2",
    "1.2.1\n3",
    "-1.2",
    "1" * 100,
    "\u0663.\u0661",
]


@pytest.mark.parametrize(("older", "newer"), list(pairwise(ASCENDING)))
def test_versions_are_ordered(older: str, newer: str) -> None:
    assert parse_trtllm_version(older) < parse_trtllm_version(newer)


@pytest.mark.parametrize(
    ("left", "right"),
    [("1.0", "1.0.0"), ("1.0.0.0", "1.0"), ("1.1.0+cu13", "1.1.0"), ("v1.2.1", "1.2.1"), ("1.2.0-rc.3", "1.2.0RC3")],
)
def test_ways_of_writing_are_equal(left: str, right: str) -> None:
    assert parse_trtllm_version(left) == parse_trtllm_version(right)
    assert hash(parse_trtllm_version(left)) == hash(parse_trtllm_version(right))


@pytest.mark.parametrize("text", [*ASCENDING, "1.1.0+cu13", "1.3.0rc29+g0123abc"])
def test_text_is_given_back(text: str) -> None:
    assert str(parse_trtllm_version(f" {text}\n")) == text


def test_text_is_made_where_there_is_none() -> None:
    assert str(TrtllmVersion((1, 2, 1))) == "1.2.1"


@pytest.mark.parametrize(
    ("text", "minor", "final"),
    [("1.2.1", (1, 2), True), ("1.3.0rc22", (1, 3), False), ("1.0.post1", (1, 0), True), ("1.0.dev2", (1, 0), False)],
)
def test_parts(text: str, minor: tuple[int, int], final: bool) -> None:
    version = parse_trtllm_version(text)
    assert (version.minor, version.is_final) == (minor, final)


@pytest.mark.parametrize("text", NONE)
def test_what_is_no_version_is_refused(text: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_trtllm_version(text)
    assert "1.3.0rc22" in caught.value.expected
    assert "tensorrt_llm" in caught.value.fix
    assert len(caught.value.problem) < 120


@given(st.text())
def test_any_text_is_a_version_or_refused(text: str) -> None:
    with suppress(UsageError):
        assert str(parse_trtllm_version(text)) == text.strip()


@pytest.mark.parametrize(
    ("metadata", "version"),
    [
        ("Metadata-Version: 2.1\nName: tensorrt_llm\nVersion: 1.2.1\n", "1.2.1"),
        ("Metadata-Version: 2.1\nName: tensorrt-llm\nVersion: 1.3.0rc29\n", "1.3.0rc29"),
        ("Metadata-Version: 2.1\nName: tensorrt-llm\nVersion: unknown\n", None),
        ("Metadata-Version: 2.1\nName: tensorrt-llm\n", None),
    ],
)
def test_installed_version(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, metadata: str, version: str | None) -> None:
    info = tmp_path / "tensorrt_llm-0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(metadata, encoding="utf-8")
    (tmp_path / "tensorrt_llm.py").write_text("raise AssertionError('imported')\n", encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    found = installed_trtllm_version()
    assert (None if found is None else str(found)) == version
    assert "tensorrt_llm" not in sys.modules


def test_none_is_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    assert installed_trtllm_version() is None


@pytest.mark.parametrize("module", ["trtllm_version", "engine_keys", "key_rules"])
def test_import_is_cheap(module: str) -> None:
    heavy = ["difflib", "importlib.metadata", "yaml", "json"]
    script = f"import sys, dynamo_mpi.layout.{module}; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-S", "-c", script], capture_output=True, text=True, check=False, cwd=ROOT)
    assert (done.stdout.strip(), done.stderr) == ("[]", "")
