# SPDX-License-Identifier: Apache-2.0
"""The pages of docs/ that are written from the code are what the code says today."""

from __future__ import annotations

import re
from fnmatch import fnmatch

import pytest

from dynamo_mpi.cli.main import VERBS
from dynamo_mpi.common.errors import ExitCode
from tests.conftest import ROOT
from tools.gen_docs import exit_codes, markdown
from tools.gen_docs.__main__ import PAGES
from tools.gen_docs.environment import VARIABLES

DOCS = ROOT / "docs"


@pytest.mark.parametrize("name", PAGES)
def test_the_page_is_fresh(name: str) -> None:
    assert (DOCS / name).read_text(encoding="utf-8") == PAGES[name](), "stale: make docs"


def test_every_verb_and_program_has_its_section() -> None:
    text = PAGES["reference/command-line.md"]()
    for command in (
        *(f"dynamo-mpi {verb}" for verb in VERBS),
        *("python -m dynamo_mpi.worker", "python -m dynamo_mpi.head_node"),
        *("python -m dynamo_mpi.pods lead", "python -m dynamo_mpi.pods join"),
    ):
        assert f"\n## {command}\n" in text
    assert "| `--drain-timeout SECONDS` | seconds that requests in flight may take after SIGTERM" in text
    assert "| `--output text\\|json` |" in text


def test_a_setting_has_its_flags_variables_key_default_and_meaning() -> None:
    rows = PAGES["reference/settings.md"]().splitlines()
    (row,) = [row for row in rows if row.startswith("| `--kv-pull-timeout`")]
    cells = [cell.strip() for cell in row.strip("|").split(" | ")]
    assert cells[:4] == ["`--kv-pull-timeout`", "`DYN_MPI_KV_PULL_TIMEOUT`", "`kv_pull_timeout`", "10"]
    assert any("`--enable-attention-dp`, `--no-enable-attention-dp`" in row for row in rows)


def test_every_variable_of_ours_in_the_source_stands_in_a_page() -> None:
    # a verb's own options stand with the verb
    said = set(re.findall(r"\bDYN_MPI_\w+", PAGES["reference/settings.md"]() + PAGES["reference/command-line.md"]()))
    patterns = [name for variable in VARIABLES for name in variable.names if name.endswith("*") and name != "DYN_*"]
    sources = [*(ROOT / "dynamo_mpi").rglob("*.py"), *(ROOT / "scripts").glob("*.sh"), *(ROOT / "tests").glob("*.py")]
    used = set()
    for path in sources:
        used |= set(re.findall(r"\bDYN_MPI_[A-Z0-9_]*[A-Z0-9]\b", path.read_text(encoding="utf-8")))
    missing = {name for name in used - said if not any(fnmatch(name, one) for one in patterns)}
    assert len(used) > 40
    assert not missing, "add them to tools/gen_docs/environment.py, and make docs"


def test_every_exit_code_says_what_to_do() -> None:
    assert set(exit_codes.TO_DO) == set(ExitCode)
    assert set(markdown.member_notes(ExitCode)) == {code.name for code in ExitCode} - {"OK"}


def test_every_member_of_a_record_has_its_meaning() -> None:
    rows = [row for row in PAGES["reference/record.md"]().splitlines() if row.startswith("| `")]
    assert len(rows) > 30
    assert [row for row in rows if row.endswith("| - |")] == []


def test_what_would_end_a_cell_does_not() -> None:
    assert markdown.table(("a",), [("x|y",), ("",)]) == "| a |\n| --- |\n| x\\|y |\n| - |\n"


def test_the_rules_that_a_user_looks_up_stand_there() -> None:
    rows = [line.split("|")[1].strip() for line in PAGES["reference/rules.md"]().splitlines() if line.startswith("| ")]
    ids = {name for row in rows for name in row.replace("-", ", ").split(", ")}
    assert {"A1", "A2", "B1", "B3", "D1", "D5", "E1", "E4", "F3", "F9", "G", "H", "H14", "I1", "I6", "J", "R1"} <= ids
    assert {
        "P1",
        "P4",
        "P5",
        "D10",
        "G6",
        "K1",
        "K9",
        *(f"N{number}" for number in range(1, 8)),
        *(f"V{number}" for number in range(1, 16)),
    } <= ids
