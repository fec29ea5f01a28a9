# SPDX-License-Identifier: Apache-2.0
"""The whole stack over other MPI libraries than the environment's own."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import mpi_environment, run_command
from tests.mpi_flavours import MpiFlavour, Unavailable, debian_openmpi, mpich_wheel

pytestmark = pytest.mark.dynamo


@pytest.mark.parametrize("flavour", ["mpich-wheel", "debian-openmpi"])
def test_answers_over(flavour: str, tmp_path: Path, mpich_folder: Path) -> None:
    makers: dict[str, Callable[[], MpiFlavour | Unavailable]] = {
        "mpich-wheel": lambda: mpich_wheel(mpich_folder),
        "debian-openmpi": debian_openmpi,
    }
    mpi = makers[flavour]()
    if isinstance(mpi, Unavailable):
        pytest.skip(mpi.reason)
    question = ["--ask", "What is the capital of France?", "--output", "json", "--mpirun", str(mpi.mpirun)]
    command = [sys.executable, "-m", "dynamo_mpi.cli.main", "local", *question]
    done = run_command(command, env=mpi_environment(mpi.environment), timeout=180, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert "Paris" in result["answer"]["text"]
    assert result["worker"]["ranks"] == 3
