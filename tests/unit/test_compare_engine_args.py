# SPDX-License-Identifier: Apache-2.0
"""The tool that compares a release's arguments with the tables, on two small made files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from dynamo_mpi.layout.engine_keys import EngineKeys, Key
from dynamo_mpi.layout.engine_values import EngineValues
from dynamo_mpi.layout.trtllm_version import parse_trtllm_version
from tests.conftest import ROOT
from tools.compare_engine_args.__main__ import TABLE, dump, main
from tools.compare_engine_args.source import Arguments, read_source
from tools.compare_engine_args.table import add, compare

MADE = ROOT / "tests/data/engine_args"
EMPTY: dict[str, Any] = {
    "about": ["a made table"],
    "sources": [],
    "variants": {},
    "validators": [],
    "code": {},
    "key_conflicts": [],
    "values": {},
}


def read(name: str) -> Arguments:
    return read_source((MADE / f"{name}.txt").read_text())


def source(version: str) -> dict[str, Any]:
    return {"name": version, "from": version, "to": version}


def table() -> dict[str, Any]:
    return add(read("older"), EMPTY, source("1.0.0"))


def keys_of(found: Arguments) -> EngineKeys:
    sections = {place: {key: Key(key) for key in specs} for place, specs in found.values.items() if "=" not in place}
    sections["speculative_config"] |= {key: Key(key) for key in ("depth", "model")}
    return EngineKeys("1.0.0", "1.0", (), {}, sections, {}, {})


def test_what_a_file_declares() -> None:
    found = read("older")
    assert found.values == {
        "": {
            "limit": "int",
            "max_limit": "int",
            "kv_cache_config": "section",
            "speculative_config": "section ?",
            "plan": "=fast|safe",
            "level": "str / =AUTO|DUMMY",
            "exact": "int!",
            "ratio": "float >0",
            "names": "[str]",
            "table": "map",
            "pair": "[any]",
            "handler": "any",
        },
        "kv_cache_config": {
            "size": "int ?",
            "share": "float >=0 <=1 ?",
            "dtype": "str",
            "window": "[int]+ ?",
            "policy": "=first|last",
        },
        "speculative_config": {"length": "int ?", "decoding_type": "=Near|Far", "model": "str ?"},
        "speculative_config=Near": {"depth": "int >0"},
        "speculative_config=Far": {"depth": "int >=0"},
    }
    assert found.discriminators == {"speculative_config": "decoding_type"}
    assert found.variants == {
        "speculative_config=*": ["length", "decoding_type", "depth"],
        "speculative_config=Near": ["decoding_type"],
        "speculative_config=Far": ["decoding_type", "model"],
    }
    assert found.validators == ["Cache.validate_share"]


def test_the_same_file_has_no_difference() -> None:
    assert list(compare(read("older"), table(), keys_of(read("older")), parse_trtllm_version("1.0.0"))) == []


def test_what_is_new_gone_and_different() -> None:
    lines = compare(read("newer"), table(), keys_of(read("older")), parse_trtllm_version("1.1.0"))
    assert list(lines) == [
        "new key     brand_new",
        "gone key    names",
        "differs     plan: one of fast, safe, or null; the table has one of fast, safe",
        "new value   brand_new: bool",
        "differs     kv_cache_config.policy: one of first, last, never; the table has one of first, last",
        "differs     speculative_config.decoding_type: one of Near, Far, Farther; the table has one of Near, Far",
        "new value   speculative_config=Farther.depth: int >=0",
        "new variant speculative_config=Farther: decoding_type model",
        "new check   Farther.validate_model: read it, and see whether a rule must know it",
    ]


def test_a_version_is_added_and_then_known() -> None:
    both = add(read("newer"), table(), source("1.1.0"))
    assert both["values"][""]["plan"] == {"1.0.0": "=fast|safe", "1.1.0": "=fast|safe ?"}
    assert both["values"][""]["exact"] == "int!"
    assert both["validators"] == ["Cache.validate_share", "Farther.validate_model"]
    newer = read("newer")
    assert list(compare(newer, both, keys_of(newer), parse_trtllm_version("1.1.0"))) == []
    values = EngineValues(both)
    around = values.around(parse_trtllm_version("1.0.5"))
    assert around == range(2)
    assert [spec.null for spec in values.specs("", "plan", None, around)] == [False, True]
    assert values.keys_of_variant("speculative_config", "Fast", range(1)) is None
    assert values.keys_of_variant("speculative_config", "Farther", range(1, 2)) == frozenset(
        {"length", "decoding_type", "depth", "model"}
    )


def test_a_partial_source_keeps_the_rest() -> None:
    some = read_source("class TorchLlmArgs:\n    exact: int = 1\n")
    both = add(some, table(), source("1.1.0") | {"partial": True})
    assert both["values"][""]["exact"] == {"1.0.0": "int!", "1.1.0": "int"}
    assert both["values"][""]["plan"] == "=fast|safe"


def run(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    code = main(list(words))
    out, err = capsys.readouterr()
    return code, out, err


def test_the_command_writes_a_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    there = tmp_path / "values.json"
    there.write_text(dump(table()))
    words = (
        str(MADE / "newer.txt"),
        "--version",
        "1.1.0",
        "--table",
        str(there),
        "--commit",
        "abc",
        "--date",
        "2026-01-02",
    )
    code, out, _ = run(capsys, *words, "--write")
    assert code == 1
    assert "2 x new value, 1 x new variant, 1 x new check" in out.replace("3 x differs, ", "")
    assert "mark new keys NAME@1.1 and gone keys NAME<1.1" in out
    written = json.loads(there.read_text())
    assert written["sources"][-1]["commit"] == "abc"
    assert written["sources"][-1]["date"] == "2026-01-02"
    assert "differs" not in run(capsys, *words)[1]


@pytest.mark.parametrize(
    ("text", "version", "said"),
    [
        ("class Other: pass", "1.0.0", "no class TorchLlmArgs"),
        ("class (", "1.0.0", "invalid syntax"),
        ("class TorchLlmArgs: pass", "newest", "not a version"),
    ],
)
def test_what_cant_be_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str, version: str, said: str
) -> None:
    file = tmp_path / "args.py"
    file.write_text(text)
    code, _, err = run(capsys, str(file), "--version", version)
    assert code == 2
    assert said in err


def test_the_table_is_as_the_tool_writes_it() -> None:
    assert dump(json.loads(TABLE.read_text())) == TABLE.read_text()
