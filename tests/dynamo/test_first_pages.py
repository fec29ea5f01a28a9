# SPDX-License-Identifier: Apache-2.0
"""What the README and the page of the first worker have readers type, as it stands, with all its real parts."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.dynamo.marked_command import MarkedCommand
from tests.pages import commands

pytestmark = pytest.mark.dynamo

BLOCKS = {
    "README.md": ("two-commands", "refusal-and-fault"),
    "docs/getting-started/one-machine.md": ("answer", "refusal", "killed-rank"),
}
# the whole line, its exit code, and what is said
LINES = {
    'scripts/local.sh --ask "What is the capital of France?"': (0, "Paris"),
    "scripts/local.sh --tp 2": (78, "would work: TP1/PP2 on 2 GPUs"),
    'DYN_MPI_ALLOW_FAULTS=1 DYN_MPI_FAULT=rank1:serve:kill scripts/local.sh --ask "Tell me a story."': (
        137,
        "died: its process exited without reporting an error",
    ),
    # the tests themselves
    "scripts/test.sh": None,
}
# `.ci/run` runs the first one after its installation
LANDING = ("scripts/local.sh --tp 2", *(line for line in LINES if "FAULT" in line))


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A checkout in which the first start has been made, so that nothing is installed."""
    checkout = tmp_path / "checkout"
    (checkout / ".venv" / "bin").mkdir(parents=True)
    (checkout / "scripts").symlink_to(ROOT / "scripts")
    shutil.copy(ROOT / "pyproject.toml", checkout)
    (checkout / ".venv" / "bin" / "dynamo-mpi").symlink_to(Path(sys.executable).parent / "dynamo-mpi")
    with (checkout / "pyproject.toml").open() as project:
        checksum = subprocess.run(["cksum"], stdin=project, capture_output=True, text=True, check=True).stdout
    (checkout / ".venv" / "dynamo-mpi-local.stamp").write_text(checksum)
    return checkout


def test_all_that_is_typed_is_known() -> None:
    typed = {
        line.partition("   #")[0].rstrip()
        for page, names in BLOCKS.items()
        for n in names
        for line in commands(page, n)
    }
    assert typed == set(LINES)


@pytest.mark.landing(*LANDING)
@pytest.mark.parametrize("line", [line for line, expected in LINES.items() if expected])
def test_the_line_does_what_the_page_says(line: str, checkout: Path, tmp_path: Path) -> None:
    expected = LINES[line]
    assert expected is not None
    words = ["bash", "-c", f"cd {checkout} && {line}"]
    with MarkedCommand(tmp_path, words, {}) as command:
        assert command.wait() == expected[0], command.err
        assert expected[1] in command.out + command.err
