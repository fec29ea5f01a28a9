# SPDX-License-Identifier: Apache-2.0
"""The whole stack under another MPI's launcher than the environment's own. Debian's stands in tests/slurm, which installs it."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.conftest import answer_with
from tests.mpi_flavours import Unavailable, mpich_wheel

pytestmark = pytest.mark.dynamo


def test_answers_under_mpich(tmp_path: Path, mpich_cache: Path) -> None:
    mpi = mpich_wheel(mpich_cache)
    assert not isinstance(mpi, Unavailable), mpi.reason
    result = answer_with(mpi, tmp_path)
    assert "Paris" in result["answer"]["text"]
    assert result["worker"]["ranks"] == 3
