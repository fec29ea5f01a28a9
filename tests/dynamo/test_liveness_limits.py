# SPDX-License-Identifier: Apache-2.0
"""A worker whose rank 0 may open too few files for its ranks is refused before anything is loaded or registered."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tests.conftest import find_mpirun, mpi_environment, run_command
from tests.dynamo.running import EtcdServer

pytestmark = pytest.mark.dynamo


def test_a_hard_limit_of_open_files_that_is_too_low_is_refused(etcd: EtcdServer, model_dir: Path) -> None:
    before = etcd.revision()
    limited = ("sh", "-ec", 'ulimit -n 300; exec "$@"', "sh")
    rank = (sys.executable, "-m", "dynamo_mpi.worker", "--model", str(model_dir), "--tensor-parallel-size", "3")
    environment = mpi_environment({"ETCD_ENDPOINTS": etcd.url, "DYN_LOG": "error"})
    done = run_command([find_mpirun(), "-n", "3", *limited, *rank], env=environment, timeout=60)
    assert done.returncode == 64, done.stderr
    assert "rank 0 may have 300 files open" in done.stderr
    assert "ulimit -n 323" in done.stderr
    assert "Traceback" not in done.stderr
    assert etcd.written("v1/", before) == []
