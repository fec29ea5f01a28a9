# SPDX-License-Identifier: Apache-2.0
"""What the tests on Slurm and several hosts accept, which crash they run again, exit codes by release, and how memory runs out."""

from __future__ import annotations

import signal
import subprocess
import sys
import time

import pytest

from dynamo_mpi.common.failure import DetectedBy, Failure
from dynamo_mpi.mpi.launcher import Launcher
from dynamo_mpi.supervisor.agent_failures import ObservedFailure, compose_report
from dynamo_mpi.supervisor.failure_reports import rank_ended
from tests.fault_cases import CHILD, Case
from tests.fault_traces import run_out_of_memory, why_no_memory_limit
from tests.mpi_crashes import is_mpi_crash
from tests.slurm import fault_runner


@pytest.mark.parametrize(("phase", "runs_again"), [("mpi_init", True), ("load", False)])
def test_a_crash_in_mpis_start_runs_again(phase: str, runs_again: bool) -> None:
    text = str(rank_ended("n1", phase, 139, Launcher.SLURM_PMIX))
    failure = Failure(1, 70, text, DetectedBy.DISCONNECT, phase, time.monotonic())
    report = compose_report([ObservedFailure(failure, "n1")], phase).text
    assert is_mpi_crash(f"srun: error: n1: task 1: Segmentation fault\n{report}") == runs_again
    assert not is_mpi_crash(report)


MPIRUN = (
    "[h1:00035] PMIX ERROR: PMIX_ERR_UNREACH in file /openmpi-5.0.11/3rd-party/openpmix/src/mca/ptl/base/"
    "ptl_base_connection_hdlr.c at line 103"
)
MPIEXEC = "YOUR APPLICATION TERMINATED WITH THE EXIT STRING: Segmentation fault (signal 11)"


@pytest.mark.parametrize(("phase", "words"), [("mpi_init", MPIRUN), ("preflight", MPIEXEC)])
def test_a_crash_of_mpi_beside_a_fault_at_its_start_runs_again(phase: str, words: str) -> None:
    def printed(phase: str) -> str:
        return f"E       dynamo_mpi: rank 1 on h2: fault: exit 3 in {phase}\nE       {words}\n"

    assert is_mpi_crash(printed(phase))
    assert not is_mpi_crash(printed("load"))
    assert not is_mpi_crash(printed(phase).replace(words, "exit code 5"))


@pytest.mark.parametrize(("fault", "rank"), [("kill", 1), ("exit0", 1), ("stop", 1), ("exception", 1), ("kill", CHILD)])
def test_only_open_mpi_5_may_end_a_rank_with_its_own_code(
    fault: str, rank: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = Case(fault, "serve", rank)
    monkeypatch.setattr(fault_runner, "debian_openmpi_major", lambda: 4)
    of_4 = fault_runner.codes_for(case)
    monkeypatch.setattr(fault_runner, "debian_openmpi_major", lambda: 5)
    assert 14 not in of_4
    ends_the_others = rank != CHILD and fault in ("kill", "exit0")
    assert set(fault_runner.codes_for(case)) - set(of_4) == ({14} if ends_the_others else set())


def test_a_process_that_only_waits_runs_out_of_memory_too() -> None:
    if reason := why_no_memory_limit():
        pytest.skip(reason)
    program = (sys.executable, "-c", "import time; print(flush=True); time.sleep(300)")
    with subprocess.Popen(program, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        try:
            process.stdout.readline()
            with run_out_of_memory(process.pid):
                assert process.wait(10) == -signal.SIGKILL
        finally:
            process.kill()
