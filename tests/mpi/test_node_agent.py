# SPDX-License-Identifier: Apache-2.0
"""A rank's failure before the verdict, while the others are in MPI's start or in the preflight: seen, reported once, and the world ends."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import find_mpirun, mpi_environment, run_command
from tests.dynamo.running import eventually
from tests.mpi.test_worker_refusals import make_model

pytestmark = pytest.mark.mpi

RANKS = 3
HEARTBEAT = 2.0
PROMPT_SECONDS = 3.0
HOST = os.uname().nodename
# the launcher may be the first to see a process end, and has codes of its own: 128 + the signal, or the process's own, or 1
OURS_OR_LAUNCHERS = {
    "kill": {70, 137},
    "exit0": {70, 1},
    "exit3": {70, 3},
    "exception": {70},
    "stop": {124},
    "hang": {124},
}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return make_model(tmp_path / "model")


@pytest.fixture
def failures(tmp_path: Path) -> Path:
    return tmp_path / "failures"


@pytest.fixture(scope="module")
def usual_seconds(tmp_path_factory: pytest.TempPathFactory) -> float:
    """How long a start takes to the verdict here and now, when nothing is wrong."""
    model = make_model(tmp_path_factory.mktemp("usual") / "model")
    begin = time.monotonic()
    done = run_command(worker(model), env=mpi_environment(), timeout=60)
    assert done.returncode == 0, done.stderr
    return time.monotonic() - begin


def worker(model: Path, *words: str) -> list[str]:
    return [
        *(find_mpirun(), "-n", str(RANKS), sys.executable, "-m", "dynamo_mpi.worker"),
        *("--model", str(model), "--tensor-parallel-size", str(RANKS), "--preflight-only", *words),
    ]


def variables(folder: Path, fault: str, **more: str) -> dict[str, str]:
    return mpi_environment(
        {
            "DYN_MPI_FAULT": fault,
            "DYN_MPI_ALLOW_FAULTS": "1",
            "DYN_MPI_HEARTBEAT_TIMEOUT": str(HEARTBEAT),
            "DYN_MPI_FAILURE_DIR": str(folder),
            "DYN_MPI_LOG_DIR": str(folder.with_name("logs")),
            **more,
        }
    )


def failure_of(folder: Path, rank: int) -> dict[str, Any]:
    file = folder / f"worker-rank-{rank}.json"
    # the agent logs first, and the launcher may have ended before it has written the file
    eventually(file.exists)
    content: dict[str, Any] = json.loads(file.read_text())
    return content


def processes(session: int) -> list[int]:
    """Return a launcher's ranks and their node agents."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            try:
                words, environ = (entry / "cmdline").read_bytes(), (entry / "environ").read_bytes()
            except OSError:
                continue
            if b"dynamo_mpi" in words and f"PMIX_NAMESPACE=prterun-{HOST}-{session}@1".encode() in environ:
                found.append(int(entry.name))
    return found


def command_lines(session: int) -> list[bytes]:
    """Return theirs."""
    return [Path(f"/proc/{pid}/cmdline").read_bytes().rstrip(b"\0") for pid in processes(session)]


@pytest.mark.serial  # on a busy machine, Open MPI 5's mpirun may drop what the agent writes after a rank has left with a code
@pytest.mark.landing(
    "kill-mpi_init-2",
    "exit0-preflight-0",
    "exit3-mpi_init-0",
    "exception-preflight-2",
    "stop-preflight-2",
    "hang-mpi_init-2",
)
@pytest.mark.parametrize("rank", [0, 2])
@pytest.mark.parametrize("phase", ["mpi_init", "preflight"])
@pytest.mark.parametrize("what", ["kill", "exit0", "exit3", "exception", "stop", "hang"])
def test_is_seen_reported_once_and_ends_all(
    what: str, phase: str, rank: int, model: Path, failures: Path, usual_seconds: float
) -> None:
    begin = time.monotonic()
    done = run_command(worker(model), env=variables(failures, f"rank{rank}:{phase}:{what}"), timeout=60)
    seconds = time.monotonic() - begin
    assert done.returncode in OURS_OR_LAUNCHERS[what], done.stderr
    # counted from the start of all
    assert seconds < 2 * usual_seconds + PROMPT_SECONDS + (HEARTBEAT if what in ("stop", "hang") else 0)
    # mpirun mixes a zero into what it passes on
    errors = [line.lstrip("\0") for line in done.stderr.splitlines() if ": error in " in line]
    assert len(errors) == 1, done.stderr
    assert errors[0].startswith(f"dynamo_mpi: rank {rank} on {HOST}: error in {phase}: "), errors
    logged = (failures.with_name("logs") / f"worker-rank-{rank}.log").read_text()
    assert logged.count(errors[0].removesuffix("\n")) == 1, logged
    failure = failure_of(failures, rank)
    assert (failure["rank"], failure["host"], failure["phase"]) == (rank, HOST, phase)
    assert failure["exit_code"] == (124 if what in ("stop", "hang") else 70)


def test_a_rank_that_does_not_come_is_missed(model: Path, failures: Path) -> None:
    command = worker(model, "--world-timeout", "2")
    done = run_command(command, env=variables(failures, "rank1:environment:slow=30"), timeout=60)
    assert done.returncode == 124, done.stderr
    said = done.stderr[done.stderr.index(f"dynamo_mpi: {HOST}: error in mpi_init: no verdict after 2 s") :]
    assert "here: ranks 0, 2\n" in said
    assert "missing here: 1 of 3 ranks" in said
    assert "world.py" in said
    assert "in start_mpi" in said


def test_an_end_by_signal_is_no_failure_and_leaves_no_agent(model: Path, failures: Path) -> None:
    environment = variables(failures, "rank1:environment:slow=30")
    with subprocess.Popen(worker(model), env=environment, stderr=subprocess.PIPE, text=True) as process:
        # rank 0, the node agent that it has forked, and the others
        eventually(lambda: len(processes(process.pid)) == RANKS + 1, seconds=20)
        title = f"dynamo_mpi: node agent on {HOST}".encode()
        eventually(lambda: title in command_lines(process.pid))
        process.send_signal(signal.SIGTERM)
        _, said = process.communicate(timeout=20)
    assert process.returncode != 0
    assert ": error in " not in said
    eventually(lambda: not processes(process.pid))
    assert not failures.exists(), (said, [path.read_text() for path in failures.iterdir()])
