# SPDX-License-Identifier: Apache-2.0
"""Runs fault cases under Open MPI 5's mpirun, on this host."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from dynamo_mpi.deploy.services import Frontend
from dynamo_mpi.discovery.etcd import EtcdAuth
from dynamo_mpi.discovery.etcd_grpc import GrpcEtcdClient
from dynamo_mpi.discovery.failure_records import FailureRecord, failures_of
from tests.dynamo.running import EtcdServer, RunningWorker, running_frontend, shared_memory_of
from tests.fault_cases import CHILD, CHILD_CODES, SILENT, STREAMS, TOKENS, Case, Outcome, run_case
from tests.fault_traces import (
    PROGRAMS,
    Keys,
    Streams,
    end_process,
    find_child,
    processes_with,
    read_reports,
    remaining,
)

RANKS = 3
# what mpirun makes of the ranks' ends: the code of the first that has died, or what rank 0 has given to MPI_Abort
CODES = {
    "kill": (137,),
    "oom": (137,),
    "stop": (124,),
    "hang": (124,),
    "exception": (70,),
    "exit0": (1,),
    "exit3": (3,),
}


def codes_for(case: Case) -> tuple[int, ...]:
    """Return mpirun's exit codes for a case, each of them as good."""
    if case.rank == CHILD:
        return CHILD_CODES[case.fault]
    # before the verdict the node agent may be quicker than mpirun
    ours = (70,) if case.phase in ("mpi_init", "preflight") and case.fault not in SILENT else ()
    return (*CODES[case.fault], *ours)


class MpirunFaults:
    """etcd and the frontend on loopback, for all cases."""

    def __init__(self, etcd: EtcdServer, frontend: Frontend, model: Path) -> None:
        self.etcd, self.frontend, self.model = etcd, frontend, model

    def run(self, case: Case, folder: Path) -> Outcome:
        """Start a worker, let the case happen to it, and see what is left."""
        # its temporary folder's name also marks all that it starts; short, as a unix socket's name holds 107 bytes
        temporary, trigger, failures = Path(tempfile.mkdtemp(prefix="t-")), folder / "now", folder / "failures"
        programs = [program("watch_keys.py", self.etcd.url, case.namespace)]
        variables = {**case.environment(trigger), "TMPDIR": str(temporary)}
        worker = RunningWorker(folder, self.etcd, self.model, RANKS, *case.flags(failures), **variables)
        memory: set[str] = set()

        def open_streams() -> Streams:
            words = (str(self.frontend.port), case.namespace, str(STREAMS), str(TOKENS))
            programs.append(program("hold_streams.py", *words))
            return Streams(programs[-1])

        def look() -> None:
            memory.update(shared_memory_of(worker.members()))

        def find_rank(rank: int) -> int:
            if rank == CHILD:
                return find_child(processes_with(f"TMPDIR={temporary}\0"))
            mark = f"OMPI_COMM_WORLD_RANK={rank}\0".encode()
            (pid,) = [pid for pid in worker.members() if mark in Path(f"/proc/{pid}/environ").read_bytes()]
            return pid

        try:
            outcome = run_case(
                case,
                worker,
                trigger,
                Keys(programs[0]),
                open_streams,
                lambda: os.kill(worker.rank_zero(), signal.SIGTERM),
                find_rank,
                worker.stop,
                look,
            )
            outcome.left += remaining(f"TMPDIR={temporary}\0")
            # not before: node agents write them beside the log, and outlive the launcher
            outcome.reports = read_reports(failures)
            assert memory or not case.streaming, "Open MPI has no shared memory where it always has some"
            outcome.left += [name for name in memory if os.path.exists(name)]
            # an engine that is killed leaves things of its own
            ours = "*" if case.engine == "reference" else "dynamo_mpi*"
            outcome.left += [path.name for path in temporary.glob(ours)]
            return outcome
        finally:
            worker.stop()
            for process in programs:
                end_process(process)
            shutil.rmtree(temporary)

    def check_last_failure(self, case: Case) -> None:
        """See that the worker has left in etcd what it died of, whichever process wrote it; before the verdict nothing."""
        etcd = GrpcEtcdClient([self.etcd.url], EtcdAuth(), 5)
        with contextlib.closing(etcd):
            left = [FailureRecord.unpack(entry.value) for entry in etcd.get_prefix(failures_of(case.namespace))]
        expected = [] if case.phase in ("mpi_init", "preflight") else [max(0, case.rank)]
        assert [failure.rank for failure in left] == expected
        for failure in left:
            # the report has the world's phase, the rest is of the rank's own
            assert f"error in {case.phase}: " in failure.report or case.phase == "drain"
            assert failure.error


def program(name: str, *words: str) -> subprocess.Popen[str]:
    """Start one of the programs that look on."""
    command = [sys.executable, str(PROGRAMS / name), *words]
    return subprocess.Popen(command, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


@contextmanager
def mpirun_faults(folder: Path, model: Path) -> Iterator[MpirunFaults]:
    """Run etcd and the frontend, with their files in ``folder``."""
    etcd = EtcdServer(folder)
    etcd.start()
    try:
        with running_frontend(folder, etcd) as frontend:
            yield MpirunFaults(etcd, frontend, model)
    finally:
        etcd.stop()
