# SPDX-License-Identifier: Apache-2.0
"""Rank 0's guard over real ranks: one report, the right code, from wherever it comes."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.conftest import Mpirun

pytestmark = pytest.mark.mpi
PROGRAM = Path(__file__).parent / "programs" / "guarded_world.py"


def test_a_world_that_comes_through_ends_with_zero(mpirun: Mpirun) -> None:
    done = mpirun(3, PROGRAM, "nothing", "9")
    assert done.returncode == 0, done.stderr
    assert "error" not in done.stderr


@pytest.mark.parametrize("victim", [0, 2])
def test_an_error_is_told_with_its_rank(mpirun: Mpirun, victim: int) -> None:
    done = mpirun(3, PROGRAM, "raise", str(victim))
    assert done.returncode == 70, done.stderr
    assert done.stderr.count("error in environment: ") == 1
    assert ("rank 2 on here: Traceback" in done.stderr) is (victim == 2)
    assert "ValueError: this rank has had enough" in done.stderr
    assert "cleaned up" in done.stderr


def test_a_deadline_tells_where_every_rank_stands(mpirun: Mpirun) -> None:
    done = mpirun(3, PROGRAM, "hang", "1")
    assert done.returncode == 124, done.stderr
    assert "the barrier was not passed after 1 s" in done.stderr
    assert "--patience gives it longer" in done.stderr
    _, _, stacks = done.stderr.partition("where the ranks are:\n")
    hung, others = stacks.index("rank 1 on here:\n"), stacks.index("ranks 0, 2 on here:\n")
    assert hung < stacks.index("in wait_for_what_never_comes") < others


def test_a_rank_that_can_not_answer_is_told_first(mpirun: Mpirun) -> None:
    done = mpirun(3, PROGRAM, "stop", "1")
    assert done.returncode == 124, done.stderr
    _, _, stacks = done.stderr.partition("where the ranks are:\n")
    assert stacks.startswith("rank 1 on here: no answer"), done.stderr
