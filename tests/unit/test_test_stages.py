# SPDX-License-Identifier: Apache-2.0
"""The stages of the tests themselves: which files a stage reads, and in which order the tests run."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.conftest import stage_of, stages_of_file

ONE_EACH = "import pytest\n\n\n@pytest.mark.slow\ndef test_one() -> None: ...\n\n\n@pytest.mark.serial\ndef test_two() -> None: ...\n"


@pytest.mark.parametrize(
    ("marks", "stage"),
    [
        ((), "fast"),
        (("full",), "fast"),
        (("slow",), "parallel"),
        (("slurm",), "parallel"),
        (("slurm", "serial"), "alone"),
    ],
)
def test_a_stage_follows_from_the_markers(marks: tuple[str, ...], stage: str) -> None:
    assert stage_of(marks) == stage


@pytest.mark.parametrize(
    ("text", "stages"),
    [
        ("import pytest\n", {"fast"}),
        (ONE_EACH, {"fast", "parallel", "alone"}),
        ("pytestmark = pytest.mark.dynamo\n\n\n@pytest.mark.full\n", {"parallel"}),
        ("pytestmark = [pytest.mark.hosts, pytest.mark.serial]\n@pytest.mark.full\n", {"alone"}),
        (
            "pytestmark = [\n    pytest.mark.hosts,\n    pytest.mark.full,\n]\n@pytest.mark.serial\n",
            {"parallel", "alone"},
        ),
    ],
)
def test_a_file_is_read_in_the_stages_of_its_markers(text: str, stages: set[str], tmp_path: Path) -> None:
    file = tmp_path / "test_x.py"
    file.write_text(text)
    assert stages_of_file(file) == stages
