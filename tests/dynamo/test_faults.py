# SPDX-License-Identifier: Apache-2.0
"""Faults in a worker of three ranks under Open MPI 5's mpirun: the world ends at once, says why, and leaves nothing behind."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.dynamo.fault_runner import MpirunFaults, codes_for, mpirun_faults
from tests.fault_cases import CHILD, Case, parameters, trtllm_parameters
from tests.fault_traces import why_no_memory_limit

pytestmark = pytest.mark.dynamo
CHOSEN = (
    Case("kill", "serve", 1),
    Case("stop", "serve", 1),
    Case("exception", "serve", 0),
    Case("kill", "serve", 0),
    Case("exit3", "drain", 1),
    Case("exit0", "load", 1),
    Case("exception", "load", 1),
    Case("oom", "load", 1),
    Case("kill", "mpi_init", 1),
    Case("stop", "preflight", 1),
)


@pytest.fixture(scope="module")
def runner(tmp_path_factory: pytest.TempPathFactory, model_dir: Path) -> Iterator[MpirunFaults]:
    """etcd and the frontend, for all cases of this module."""
    with mpirun_faults(tmp_path_factory.mktemp("services"), model_dir) as running:
        yield running


@pytest.mark.landing(
    "serve-kill-rank1",
    "serve-stop-rank1",
    "serve-kill-rank0",
    "load-exception-rank1",
    "load-oom-rank1",
    "mpi_init-kill-rank1",
)
@pytest.mark.parametrize("case", parameters(CHOSEN, 1))
def test_a_fault_ends_all_at_once(case: Case, runner: MpirunFaults, tmp_path: Path) -> None:
    if case.fault == "oom" and (reason := why_no_memory_limit()):
        pytest.skip(reason)
    runner.run(case, tmp_path).check(os.uname().nodename, codes_for(case))
    runner.check_last_failure(case)


TRTLLM_CHOSEN = (
    Case("stop", "serve", CHILD, "trtllm"),
    Case("kill", "drain", CHILD, "trtllm"),
    Case("exit0", "load", 1, "trtllm"),
)


@pytest.mark.landing("serve-stop-child-trtllm")
@pytest.mark.parametrize("case", trtllm_parameters(TRTLLM_CHOSEN, 1))
def test_a_fault_of_a_tensorrt_llm_worker_ends_all_at_once(case: Case, runner: MpirunFaults, tmp_path: Path) -> None:
    if case.fault == "oom" and (reason := why_no_memory_limit()):
        pytest.skip(reason)
    runner.run(case, tmp_path).check(os.uname().nodename, codes_for(case))
    runner.check_last_failure(case)
