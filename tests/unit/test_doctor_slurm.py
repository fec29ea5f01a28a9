# SPDX-License-Identifier: Apache-2.0
"""What doctor reads from Slurm's commands: recorded answers of several versions, and programs that give none."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dynamo_mpi.mpi.launcher import Launcher
from dynamo_mpi.ops.doctor.check import Context, Status
from dynamo_mpi.ops.doctor.commands import Output
from dynamo_mpi.ops.doctor.runner import run_sections
from dynamo_mpi.ops.doctor.slurm import (
    SECTION,
    check_job,
    describe_job,
    judge_controller,
    judge_mpi_plugins,
    judge_pmix,
    judge_pyxis,
    judge_step_nodes,
    judge_time_left,
    judge_variables,
    judge_version,
)
from dynamo_mpi.ops.doctor.slurm_output import MpiPlugins, first_node, read_mpi_list, read_time_left, read_version

# Debian's 22.05.8, on stdout
LIST_22_05 = """MPI plugin types are...
\tpmix
\tnone
\tcray_shasta
\tpmi2
specific pmix plugin versions available: pmix_v4
"""
# 23.02 and later
LIST_23 = "MPI plugin types are...\n\tnone\n\tpmi2\n\tpmix\nspecific pmix plugin versions available: pmix_v3,pmix_v4,pmix_v5\n"
NO_PMIX = "MPI plugin types are...\n\tcray_shasta\n\tnone\n\tpmi2\n"
# 20.11, on stderr
LIST_20_11 = "srun: MPI types are...\nsrun: pmi2\nsrun: none\nsrun: pmix\nsrun: pmix_v3\n"
# what 22.05.8 says where libpmix.so is missing
BROKEN_PMIX = """srun: error:  mpi/pmix_v4: init: (null) [0]: mpi_pmix.c:195: pmi/pmix: can not load PMIx library
srun: error: Couldn't load specified plugin name for mpi/pmix: Plugin init() callback failed
srun: error: Invalid MPI type 'pmix', --mpi=list for acceptable types
"""
PLAIN_HELP = """Usage: srun [OPTIONS(0)... [executable(0) [args(0)...]]] [ : [OPTIONS(N)...]] executable(N) [args(N)...]

Parallel run options:
      --compress[=library]    data compression library used with --bcast
      --container             Path to OCI container bundle
"""
PYXIS_HELP = f"""{PLAIN_HELP}
Options provided by plugins:
      --container-image=[USER@][REGISTRY#]IMAGE[:TAG]|PATH
                              [pyxis] the image to use for the container
"""


def said(out: str = "", err: str = "", code: int | None = 0) -> Output:
    return Output(code, out, err, 5.0)


@pytest.mark.parametrize(
    ("text", "types", "versions"),
    [
        (LIST_22_05, ("pmix", "none", "cray_shasta", "pmi2"), ("pmix_v4",)),
        (LIST_23, ("none", "pmi2", "pmix"), ("pmix_v3", "pmix_v4", "pmix_v5")),
        (NO_PMIX, ("cray_shasta", "none", "pmi2"), ()),
        (LIST_20_11, ("pmi2", "none", "pmix", "pmix_v3"), ()),
    ],
    ids=["22.05", "23", "no pmix", "20.11"],
)
def test_the_mpi_plugins_of_every_version_are_read(
    text: str, types: tuple[str, ...], versions: tuple[str, ...]
) -> None:
    assert read_mpi_list(text) == MpiPlugins(types, versions)


@given(st.text(alphabet="MPI plugintyesar.:\n\tpmix_v4,0", max_size=80))
def test_any_other_text_is_read_or_refused(text: str) -> None:
    plugins = read_mpi_list(text)
    assert plugins is None or all(name in text for name in plugins.types)


def test_pmix_or_not() -> None:
    assert judge_mpi_plugins(said(LIST_22_05)).status is Status.OK
    assert judge_mpi_plugins(said(err=LIST_20_11)).status is Status.OK
    missing = judge_mpi_plugins(said(NO_PMIX))
    assert (missing.status, missing.found) == (Status.WARNING, "no pmix among cray_shasta, none, pmi2")
    chosen = judge_mpi_plugins(said(LIST_22_05), "pmix_v2")
    assert "SLURM_MPI_TYPE is pmix_v2" in chosen.found
    assert judge_mpi_plugins(said(LIST_22_05), "pmix_v4").status is Status.OK


def test_a_plugin_that_is_listed_and_can_not_be_loaded() -> None:
    broken = judge_pmix(said(err=BROKEN_PMIX, code=1))
    assert (broken.status, broken.code) == (Status.ERROR, 64)
    assert "can not load PMIx library" in broken.found
    assert judge_pmix(said(err="srun: Job 1 to start at 2026-11-26T02:49:03 using 1 processors")).status is Status.OK
    # no news of PMIx
    for other in (
        said(err="srun: error: Invalid account or account/partition combination specified", code=1),
        said(code=None),
    ):
        assert judge_pmix(other).status is Status.SKIPPED


@pytest.mark.parametrize(
    "output", [said(code=None), said(err="srun: fatal: no configuration", code=1), said("nonsense")]
)
def test_commands_that_give_no_answer_are_warnings(output: Output) -> None:
    for check in (judge_mpi_plugins(output), judge_pyxis(output, {}), judge_controller(output)):
        assert check.status is Status.WARNING
        assert check.expected and check.fix
    unconfigured = said(err="srun: fatal: Could not establish a configuration source", code=1)
    assert judge_version(unconfigured).status is judge_pyxis(unconfigured, {}).status is Status.SKIPPED
    assert "exit code 1: srun: fatal" in judge_version(said(err="srun: fatal: x", code=1)).found


def test_containers() -> None:
    assert judge_pyxis(said(PYXIS_HELP), {"IMAGE": "x.sqsh"}).status is Status.OK
    assert judge_pyxis(said(PLAIN_HELP), {}).status is Status.SKIPPED
    assert judge_pyxis(said(PLAIN_HELP), {"IMAGE": "x.sqsh"}).status is Status.WARNING


@pytest.mark.parametrize(
    ("text", "version"),
    [
        ("slurm-wlm 22.05.8\n", (22, 5)),
        ("slurm 23.11.4\n", (23, 11)),
        ("slurm 25.05.0-0rc1\n", (25, 5)),
        ("bash 5.2", None),
    ],
)
def test_versions(text: str, version: tuple[int, int] | None) -> None:
    assert read_version(text) == version


def test_an_old_slurm_is_reported() -> None:
    assert judge_version(said("slurm 20.02.7\n")).status is Status.WARNING
    assert judge_version(said("slurm 22.05.8\n")).found == "slurm 22.05.8"


def test_controllers() -> None:
    up = "Slurmctld(primary) at login is UP\n"
    assert judge_controller(said(up)).found == "login up"
    assert judge_controller(said(f"{up}Slurmctld(backup1) at spare is DOWN\n")).found == "login up; spare down"
    down = judge_controller(said("Slurmctld(primary) at login is DOWN\n", code=1))
    assert (down.status, down.found) == (Status.WARNING, "slurmctld on login is down")


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("58:03", 3483),
        ("1:00:00", 3600),
        ("2-01:00:00", 176400),
        ("30", 30),
        ("UNLIMITED", None),
        ("INVALID", None),
        ("", None),
    ],
)
def test_time_that_is_left(text: str, seconds: int | None) -> None:
    assert read_time_left(f"{text}\n") == seconds


def test_little_time_is_reported() -> None:
    assert judge_time_left(599).status is Status.WARNING
    assert judge_time_left(-5).found == "0 minutes"
    assert judge_time_left(3600).found == "60 minutes"


# a host list, and the first host that `scontrol show hostnames` of Slurm 22.05.8 and of 24.11.5 answered; both exit 0 for invalid lists
HOST_LISTS = (
    ("n1", "n1", "n1"),
    ("a,b", "a", "a"),
    ("n[1-4]", "n1", "n1"),
    ("n[03-05,7],m1", "n03", "n03"),
    ("n[10,2-3]", "n10", "n10"),
    ("n[001-003]", "n001", "n001"),
    ("n[00-1]", "n00", "n00"),
    ("n[1-1]", "n1", "n1"),
    ("[1-2]", "1", "1"),
    (",n1", "n1", "n1"),
    (" n1", "n1", "n1"),
    ("n1, n2", "n1", "n1"),
    ("n1,,n2", "n1", "n1"),
    ("n[1-2],n[1-2]", "n1", "n1"),
    ("rack[0-3]node[0-15]", "rack0node0", "rack0node0"),
    ("r[0-1]n[00-01]", "r0n00", "r0n00"),
    ("a[1]b[2]c[3-4]", "a1b2c3", "a1b2c3"),
    ("node[01-02,10]x[5],z9", "node01x5", "node01x5"),
    ("n[1]-[2]", "n1-2", "n1-2"),
    ("r[1-2]c", "", "r1c"),
    ("n[2]m", "", "n2m"),
    ("n[1-2]-ib", "", "n1-ib"),
    ("r[0-1]n[00-01]-ib", "", "r0n00-ib"),
    ("a-b.c[1-2].d", "", "a-b.c1.d"),
    ("n[1-2]x,m[3-4]", "", "n1x"),
    ("", "", ""),
    ("n[]", "", ""),
    ("n[a-b]", "", ""),
    ("n[3-1]", "", ""),
    ("[n1]", "", ""),
    # 22.05 answers n]
    ("n[1-2", "", ""),
    ("n[1-", "", ""),
)


@pytest.mark.parametrize(("nodes", "in_22_05", "in_24_11"), HOST_LISTS)
def test_first_node_is_what_scontrol_answers(nodes: str, in_22_05: str, in_24_11: str) -> None:
    assert first_node(nodes) == in_24_11
    assert in_22_05 in (in_24_11, "")


def test_a_long_invalid_host_list_takes_no_time() -> None:
    assert first_node("n" * 100_000 + "[") == ""


def test_a_step_that_begins_elsewhere_than_its_job() -> None:
    environ = {"SLURM_JOB_NODELIST": "n[1-4]", "SLURM_STEP_NODELIST": "n[3-4]"}
    check = judge_step_nodes(environ, Launcher.SLURM_PMIX)
    assert check is not None
    assert "SLURM_JOB_NODELIST=n[3-4] srun" in check.fix
    # racks differ in their second brackets
    racks = {"SLURM_JOB_NODELIST": "rack[0-3]node[0-15]", "SLURM_STEP_NODELIST": "rack0node[8-15]"}
    check = judge_step_nodes(racks, Launcher.SLURM_PMIX)
    assert check is not None
    assert check.found == "this step begins on rack0node8, the job on rack0node0"


def test_a_host_list_that_slurm_refuses_is_not_compared() -> None:
    environ = {"SLURM_JOB_NODELIST": "n[1-4]", "SLURM_STEP_NODELIST": "n[3-1]"}
    assert judge_step_nodes(environ, Launcher.SLURM_PMIX) is None
    assert judge_step_nodes(environ, Launcher.SLURM_PMI2) is None
    assert judge_step_nodes({**environ, "SLURM_STEP_NODELIST": "n1"}, Launcher.SLURM_PMIX) is None


def test_the_job_is_described() -> None:
    environ = {"SLURM_JOB_ID": "7", "SLURM_JOB_NUM_NODES": "2", "SLURM_JOB_NODELIST": "n[1-2]", "SLURM_NTASKS": "8"}
    assert describe_job(environ) == "job 7: 2 nodes (n[1-2]), 8 tasks"
    end = str(int(time.time()) + 7200)
    checks = {check.id: check for check in check_job(Context({**environ, "SLURM_JOB_END_TIME": end}))}
    assert checks["time-left"].found in ("119 minutes", "120 minutes")


@pytest.mark.parametrize(
    ("more", "in_rank"), [({}, True), ({"SLURM_PTY_PORT": "4711"}, False), ({"SLURM_STEP_ID": "4294967290"}, False)]
)
def test_a_shell_on_a_node_is_no_rank(more: dict[str, str], in_rank: bool) -> None:
    task = {"SLURM_JOB_ID": "7", "SLURM_STEP_ID": "0", "SLURM_PROCID": "0", "SLURM_NTASKS": "1"}
    assert Context.of({**task, **more}, 10).in_rank is in_rank


def test_variables_that_change_what_srun_means() -> None:
    environ = {"SLURM_EXPORT_ENV": "NONE", "SLURM_GPUS_PER_TASK": "1", "SLURM_GPU_BIND": "none"}
    assert [check.id for check in judge_variables(environ, in_rank=False)] == ["export", "SLURM_GPUS_PER_TASK"]
    assert [check.id for check in judge_variables(environ, in_rank=True)] == ["SLURM_GPUS_PER_TASK"]
    assert not list(judge_variables({"SLURM_EXPORT_ENV": "ALL,A=1"}, in_rank=False))


def test_an_srun_that_hangs_is_a_warning_in_time_and_is_ended(tmp_path: Path) -> None:
    started = tmp_path / "started"
    srun = tmp_path / "srun"
    # it hands its output on to one that lives longer than itself
    srun.write_text(f"#!/bin/sh\nsleep 300 &\necho $! >>{started}\n")
    srun.chmod(0o755)
    context = Context.of({"PATH": f"{tmp_path}:/usr/bin:/bin"}, 1.5)
    report = run_sections([SECTION], context, "here")
    assert report.seconds < 5
    found = {check.id: check for check in report.checks}
    for name in ("srun", "mpi-plugins", "pyxis"):
        assert found[name].status is Status.WARNING
        assert "did not end within" in found[name].found
    assert not report.exit_code
    pids = started.read_text().split()
    assert len(pids) == 3
    deadline = time.monotonic() + 5
    while alive := [pid for pid in pids if _runs(pid)]:
        assert time.monotonic() < deadline, f"{alive} still run"
        time.sleep(0.02)


def _runs(pid: str) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False
