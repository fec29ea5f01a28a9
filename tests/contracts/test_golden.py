# SPDX-License-Identifier: Apache-2.0
"""Every contract is what its golden file says, and no contract is without one."""

from __future__ import annotations

import pytest

from tests.contracts.golden_files import CONTRACTS, GOLDEN, difference, path_of
from tests.contracts.shapes import members_of


@pytest.mark.parametrize("name", CONTRACTS)
def test_contract_is_as_golden(name: str) -> None:
    if changes := difference(name, CONTRACTS[name]()):
        pytest.fail(
            f"a contract that users' scripts read has changed; if that is intended, renew it (python -m tests.contracts {name}), "
            f"add a line to CHANGELOG.md, and an alias for a name that is gone\n{changes}",
            pytrace=False,
        )


def test_no_golden_file_is_left_over() -> None:
    assert set(GOLDEN.rglob("*.txt")) == {path_of(name) for name in CONTRACTS}


@pytest.mark.parametrize("name", CONTRACTS)
def test_golden_file_names_no_machine(name: str) -> None:
    text = path_of(name).read_text(encoding="utf-8")
    assert not [word for word in ("/root", "/tmp/", "/work", "0x") if word in text]


BASE = {
    "phase": "load",
    "workers": [{"seconds": 1.5, "host": None}, {"seconds": 2.5, "host": "n1"}],
    "spans": [["load", 1.0, None]],
}


def test_members_show_types_null_and_places() -> None:
    assert members_of([BASE, {**BASE, "error": {"found": "two words"}}]) == (
        "error?: object\n"
        "error?.found: str\n"
        'phase: str = "load"\n'
        "spans: list\n"
        "spans[]: list\n"
        'spans[][0]: str = "load"\n'
        "spans[][1]: float = 1.0\n"
        "spans[][2]: null\n"
        "workers: list\n"
        "workers[]: object\n"
        'workers[].host: str | null = "n1"\n'
        "workers[].seconds: float = 1.5\n"
    )


@pytest.mark.parametrize(
    "other",
    [
        {**BASE, "phase": "start"},
        {**BASE, "phase": None},
        {**BASE, "more": 1},
        {name: value for name, value in BASE.items() if name != "phase"},
        {**BASE, "workers": [{"seconds": 1500, "host": None}]},
        {**BASE, "workers": [{"seconds": 1.5, "node": None}]},
        {**BASE, "spans": [[1.0, "load", None]]},
    ],
)
def test_every_change_of_a_member_shows(other: object) -> None:
    assert members_of([other]) != members_of([BASE])


def test_an_empty_object_makes_no_member_optional() -> None:
    assert members_of([{"memory": {"tokens": 1}}, {"memory": {}}]) == "memory: object | {}\nmemory.tokens: int = 1\n"
    assert "memory.tokens?" in members_of([{"memory": {"tokens": 1}}, {"memory": {"gpu": 1}}])


def test_names_that_are_data_are_no_members() -> None:
    one, two = ({"found": {name: {"tokens": 1}}} for name in ("a", "b"))
    assert members_of([one], maps=["found"]) == members_of([two, one], maps=["found"])
    assert members_of([one], opaque=["found"]) == "found: object\n"
