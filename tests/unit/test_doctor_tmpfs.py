# SPDX-License-Identifier: Apache-2.0
"""Slurm's TmpFS, in ranks and before containers are launched."""

from __future__ import annotations

from pathlib import Path

import pytest

from dynamo_mpi.mpi.launcher import Launcher, LaunchInfo
from dynamo_mpi.ops.doctor.check import Check, Context, Status
from dynamo_mpi.ops.doctor.tmpfs import can_make, check_tmpfs, judge_for_image, judge_in_rank, read_tmpfs

CONFIG = "Configuration data as of 2026-11-30\nTaskPlugin              = task/none\nTmpFS                   = {}\nTopology = x\n"


@pytest.mark.parametrize("folder", ["/tmp", "/local/%n/tmp", "/scratch"])
def test_tmpfs_is_read_from_slurms_configuration(folder: str) -> None:
    assert read_tmpfs(CONFIG.format(folder)) == folder
    assert read_tmpfs(CONFIG.format(folder) + "PMIxCliTmpDirBase       = (null)\n") == folder
    assert read_tmpfs(CONFIG.format(folder) + "PMIxCliTmpDirBase       = /pmix\n") == "/pmix"
    assert read_tmpfs("slurm_load_ctl_conf error") == ""


@pytest.mark.parametrize(
    ("folder", "variables", "status"),
    [
        ("/tmp", {}, Status.OK),
        ("/tmp/slurm.%n", {}, Status.OK),
        ("/tmpfs", {}, Status.WARNING),
        ("/local/scratch", {"MOUNTS": "/lustre:/lustre,/local:/local"}, Status.OK),
        ("/local/%n/scratch", {"MOUNTS": "/local"}, Status.OK),
        ("/local/scratch", {"MOUNTS": "/local:/other:ro"}, Status.WARNING),
        ("/local/scratch", {"SRUN_ARGS": "--mem=0 --container-writable"}, Status.OK),
        ("/local/scratch", {"SRUN_ARGS": "'it"}, Status.WARNING),
        ("/local/scratch", {"SRUN_ARGS": "--mem=0 --container-mounts=/data:/data,/local:/local:rw"}, Status.OK),
        ("/local/scratch", {"SRUN_ARGS": "--container-mounts /local"}, Status.OK),
        ("/local/scratch", {"SRUN_ARGS": "--container-mounts=/local:/other"}, Status.WARNING),
        ("/local/scratch", {"PYXIS_CONTAINER_MOUNTS": "/local/scratch", "MOUNTS": "/data:/data"}, Status.OK),
        ("/local/scratch", {"SRUN_ARGS": "--container-image=x --container-mounts=/local"}, Status.WARNING),
    ],
)
def test_a_folder_that_containers_lack_is_warned_of(folder: str, variables: dict[str, str], status: Status) -> None:
    check = judge_for_image(folder, variables)
    assert check.status is status
    assert (f"add {folder}:{folder} to MOUNTS" in check.fix) == (status is Status.WARNING and "%" not in folder)


@pytest.mark.parametrize(
    ("folder", "writable", "read_only", "status"),
    [
        ("/tmp", True, True, Status.OK),
        ("/scratch", False, True, Status.ERROR),
        ("", False, True, Status.SKIPPED),
        ("", False, False, Status.SKIPPED),
    ],
)
def test_in_a_rank_the_folder_itself_counts(folder: str, writable: bool, read_only: bool, status: Status) -> None:
    check = judge_in_rank(folder, writable, read_only, "no scontrol")
    assert check.status is status
    assert bool(check.fix) == (read_only and not writable)


def test_a_folder_that_can_be_made_will_do(tmp_path: Path) -> None:
    assert can_make(str(tmp_path / "a" / "b"))
    assert not can_make("/proc/self/new")
    assert not can_make("")


@pytest.mark.parametrize(
    ("launcher", "variables", "statuses"),
    [
        (Launcher.SLURM_PMIX, {}, [Status.ERROR]),
        (Launcher.SLURM_PMI2, {}, []),
        (Launcher.ALONE, {"IMAGE": "/i.sqsh"}, [Status.WARNING]),
        (Launcher.ALONE, {}, []),
    ],
)
def test_slurm_is_asked_where_it_matters(
    tmp_path: Path, launcher: Launcher, variables: dict[str, str], statuses: list[Status]
) -> None:
    scontrol = tmp_path / "scontrol"
    scontrol.write_text(
        f"#!/bin/sh\n[ \"$*\" = 'show config' ] || exit 2\ncat <<'E'\n{CONFIG.format('/proc/self/%n')}E\n"
    )
    scontrol.chmod(0o755)
    environ = {"PATH": f"{tmp_path}:/bin:/usr/bin", "SLURMD_NODENAME": "n7", **variables}
    found: list[Check] = list(check_tmpfs(Context(environ, launch=LaunchInfo(launcher, size=2))))
    assert [check.status for check in found] == statuses
    if launcher is Launcher.SLURM_PMIX:
        assert "/proc/self/n7 (Slurm's TmpFS) can't be written here" in found[0].found
