# SPDX-License-Identifier: Apache-2.0
"""``dynamo-mpi doctor`` on a real Slurm: inside a rank, and on the login node."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest

from tests.mpi_flavours import debian_openmpi_major

from .session import SlurmSession
from .stack import OUR_MODULES

pytestmark = pytest.mark.slurm
DOCTOR = (sys.executable, "-m", "dynamo_mpi.cli.main", "doctor", "--only=mpi,slurm", "--timeout=60", "--output=json")


def checks_of(done: subprocess.CompletedProcess[str]) -> dict[str, dict[str, Any]]:
    """Return what doctor found, by the check's name."""
    assert done.returncode == 0, done.stdout + done.stderr
    sections = json.loads(done.stdout)["sections"]
    return {check["id"]: check for section in sections for check in section["checks"]}


def test_inside_a_rank_and_on_the_login_node(slurm: SlurmSession) -> None:
    environment = {**OUR_MODULES, **slurm.debian_openmpi_env}
    inside = checks_of(slurm.srun("--mpi=pmix", "-n1", "--nodelist=n2", *DOCTOR, env=environment))
    assert inside["launch"]["found"] == "rank 0 of 1, by srun --mpi=pmix"
    assert inside["library"]["found"].startswith(f"Open MPI v{debian_openmpi_major()}.")
    assert "in step 0 on n2" in inside["job"]["found"]
    outside = checks_of(slurm.exec(*DOCTOR, env=environment))
    assert outside["job"]["status"] == "skipped"
    for checks in (inside, outside):
        for name in ("srun", "controller", "mpi-plugins", "pmix", "pyxis"):
            assert checks[name]["status"] == "ok", checks[name]
        assert checks["mpi-plugins"]["found"].startswith("pmix there: ")
        assert "pmix_v" in checks["mpi-plugins"]["found"]
    assert inside["tmpfs"]["status"] == "ok", inside["tmpfs"]
    # without the plugin such a task of Open MPI 4 can't even start alone
    bare = slurm.srun("-n1", *DOCTOR, env=environment)
    assert bare.returncode == (64 if debian_openmpi_major() == 4 else 0)
    assert "without an MPI plugin" in bare.stdout


@pytest.mark.full
def test_in_a_container_whose_root_is_read_only(slurm: SlurmSession) -> None:
    image = slurm.image("plain.sqsh")
    words = ("--mpi=pmix", "-n1", "--nodelist=n2", f"--container-image={image}", *DOCTOR)
    tmpfs = checks_of(slurm.srun(*words, env={**OUR_MODULES, **slurm.debian_openmpi_env}))["tmpfs"]
    # there is no Slurm to ask
    assert (tmpfs["status"], "root file system is read-only" in tmpfs["found"]) == ("skipped", True), tmpfs


@pytest.mark.full
def test_a_step_that_does_not_begin_on_the_jobs_first_node(slurm: SlurmSession) -> None:
    environment = {**OUR_MODULES, **slurm.debian_openmpi_env}
    step = ("srun", "--mpi=pmix", "-N1", "-n1", "--nodelist=n2", *DOCTOR)
    job = ("salloc", "-N2", "--nodelist=n1,n2", "sh", "-c")
    warned = checks_of(slurm.exec(*job, '"$@"', "sh", *step, env=environment))
    assert warned["step-nodes"]["status"] == "warning"
    cured = checks_of(slurm.exec(*job, 'SLURM_JOB_NODELIST=n2 "$@"', "sh", *step, env=environment))
    assert "step-nodes" not in cured
