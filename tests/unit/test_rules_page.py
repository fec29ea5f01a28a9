# SPDX-License-Identifier: Apache-2.0
"""docs/rules.md is what the rules say of themselves today."""

from __future__ import annotations

from pathlib import Path

from dynamo_mpi.preflight.rules_page import render

PAGE = Path(__file__).resolve().parents[2] / "docs" / "rules.md"


def test_the_page_is_fresh() -> None:
    assert PAGE.read_text(encoding="utf-8") == render(), "run python -m dynamo_mpi.preflight.rules_page > docs/rules.md"


def test_the_rules_that_a_user_looks_up_stand_there() -> None:
    rows = [line.split("|")[1].strip() for line in render().splitlines() if line.startswith("| ")]
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
