# SPDX-License-Identifier: Apache-2.0
"""The whole stack under another MPI's launcher than the environment's own. Debian's stands in tests/slurm, which installs it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.conftest import answer_with
from tests.dynamo.local_command import LocalCommand
from tests.mpi_flavours import Unavailable, mpich_wheel

pytestmark = pytest.mark.dynamo


def test_answers_under_mpich(tmp_path: Path, mpich_cache: Path) -> None:
    mpi = mpich_wheel(mpich_cache)
    assert not isinstance(mpi, Unavailable), mpi.reason
    result = answer_with(mpi, tmp_path)
    assert "Paris" in result["answer"]["text"]
    assert result["worker"]["ranks"] == 3


def test_what_mpichs_mpiexec_sends_when_a_rank_has_died_is_no_drain(
    tmp_path: Path, mpich_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mpi = mpich_wheel(mpich_cache)
    assert not isinstance(mpi, Unavailable), mpi.reason
    now = tmp_path / "now"
    fault = {"DYN_MPI_ALLOW_FAULTS": "1", "DYN_MPI_FAULT": f"rank1:serve@{now}:exit3"}
    for name, value in {**mpi.environment, **fault}.items():
        monkeypatch.setenv(name, value)
    with LocalCommand(tmp_path, "--keep", "--verbose", "--mpirun", f"{mpi.mpirun} -disable-auto-cleanup") as command:
        command.wait_for_text("serving until")
        now.touch()
        assert command.wait(30) != 0
        assert "SIGUSR1" not in command.err
        assert "drain: " not in command.err
        # as any other death
        assert command.err.count("[rank-0] dynamo_mpi: rank 0 on ") > 1
        assert command.err.count(": error in serve: ") == 1, command.err
        assert f"dynamo_mpi: rank 1 on {os.uname().nodename}: error in serve: died" in command.err
