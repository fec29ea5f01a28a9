# SPDX-License-Identifier: Apache-2.0
"""The bootstrap's own collectives over real MPI ranks."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.conftest import Mpirun

pytestmark = pytest.mark.mpi

PROGRAMS = Path(__file__).with_name("programs")


@pytest.mark.parametrize("ranks", [1, 2, 5])
def test_payloads_of_any_size_arrive(mpirun: Mpirun, ranks: int) -> None:
    done = mpirun(ranks, PROGRAMS / "world_collectives.py", timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.split() == ["ranks", str(ranks), "checks", "13"]


def test_a_rank_that_waits_leaves_the_core_to_others(mpirun: Mpirun) -> None:
    """Rank 0 may read a slow file system for minutes, on a node whose other ranks have nothing to do meanwhile."""
    done = mpirun(3, PROGRAMS / "idle_wait.py", "2", timeout=60)
    assert done.returncode == 0, done.stderr
    for waited, spent in json.loads(done.stdout)[1:]:
        assert waited > 1.9
        assert spent < 0.1 * waited


def test_a_rank_has_time_to_report_before_open_mpi_ends_it_for_a_lost_peer(mpirun: Mpirun) -> None:
    over_tcp = {"OMPI_MCA_btl": "tcp,self", "OMPI_MCA_pml": "ob1"}
    done = mpirun(2, PROGRAMS / "lost_peer.py", env=over_tcp, timeout=60)
    assert "rank 0 still runs" in done.stdout, done.stderr
    assert done.returncode in (70, 137), done.stderr
