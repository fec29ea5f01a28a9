# SPDX-License-Identifier: Apache-2.0
"""The whole stack under the mpirun of Debian's Open MPI 4.1, outside Slurm. It stands here because the cluster's fixture installs it."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.conftest import answer_with
from tests.mpi_flavours import debian_openmpi
from tests.slurm.session import SlurmSession

pytestmark = pytest.mark.slurm


@pytest.mark.full
def test_answers_under_open_mpi_4(slurm: SlurmSession, tmp_path: Path) -> None:
    result = answer_with(slurm.require(debian_openmpi()), tmp_path)
    assert "Paris" in result["answer"]["text"]
    assert result["worker"]["ranks"] == 3
