# SPDX-License-Identifier: Apache-2.0
"""Faults in a worker of six ranks over two nodes under ``srun --mpi=pmix``: the step ends at once, says why, and leaves nothing behind."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.fault_cases import CHILD, Case, parameters, trtllm_parameters
from tests.fault_traces import why_no_memory_limit

from .fault_runner import SrunFaults, codes_for, srun_faults
from .session import SlurmSession

pytestmark = pytest.mark.slurm
CHOSEN = (
    Case("kill", "serve", 4),
    Case("hang", "serve", 4),
    Case("exit0", "serve", 4),
    Case("stop", "serve", 0),
    Case("exception", "drain", 0),
    Case("kill", "drain", 4),
    Case("kill", "load", 4),
    Case("oom", "load", 4),
    Case("exit3", "load", 0),
    Case("exit0", "mpi_init", 4),
    Case("exception", "preflight", 4),
)


@pytest.fixture(scope="module")
def runner(slurm: SlurmSession, tmp_path_factory: pytest.TempPathFactory, model_dir: Path) -> Iterator[SrunFaults]:
    """etcd and the frontend, for all cases of this module."""
    with srun_faults(slurm, tmp_path_factory.mktemp("stack"), model_dir) as running:
        yield running


@pytest.mark.landing("serve-kill-rank4", "load-exit3-rank0")
@pytest.mark.parametrize("case", parameters(CHOSEN, 4))
def test_a_fault_ends_the_step_at_once(case: Case, runner: SrunFaults, tmp_path: Path) -> None:
    if case.fault == "oom" and (reason := why_no_memory_limit()):
        pytest.skip(reason)
    runner.run(case, tmp_path).check(runner.host(case.rank), codes_for(case))


TRTLLM_CHOSEN = (
    Case("kill", "serve", CHILD, "trtllm"),
    Case("kill", "load", 4, "trtllm"),
    Case("exception", "serve", 4, "trtllm"),
)


@pytest.mark.landing("serve-kill-child-trtllm")
@pytest.mark.parametrize("case", trtllm_parameters(TRTLLM_CHOSEN, 4))
def test_a_fault_of_a_tensorrt_llm_worker_ends_the_step_at_once(case: Case, runner: SrunFaults, tmp_path: Path) -> None:
    if case.fault == "oom" and (reason := why_no_memory_limit()):
        pytest.skip(reason)
    runner.run(case, tmp_path).check(runner.host(max(0, case.rank)), codes_for(case))
