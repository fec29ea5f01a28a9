# SPDX-License-Identifier: Apache-2.0
"""Runs fault cases under ``srun --mpi=pmix`` over two nodes."""

from __future__ import annotations

import functools
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from tests.fault_cases import CHILD, CHILD_CODES, STREAMS, TOKENS, Case, Outcome, run_case
from tests.fault_traces import (
    PROGRAMS,
    Keys,
    Streams,
    end_process,
    environment_of,
    find_child,
    processes_with,
    read_reports,
    remaining,
    replace_agent,
)
from tests.mpi_flavours import debian_openmpi_major
from tests.namespaces.commands import InsideProcess
from tests.namespaces.processes import children_of

from .session import SlurmSession
from .stack import OUR_MODULES, SlurmWorker, Stack, running_stack

NODES = ("n1", "n2")
RANKS_PER_NODE = 3
CONFIG = "tensor_parallel_size: 3\npipeline_parallel_size: 2\n"
CODES = {
    "kill": (137, 143, 70),
    "oom": (137, 143, 70),
    "stop": (124,),
    "hang": (124,),
    "exception": (70,),
    "exit0": (137, 143, 70),
    "exit3": (137, 143, 70),
}
# of Open MPI 5, as in Debian 13, whose ranks end each other where a connection closes
ENDED_BY_MPI = 14


def codes_for(case: Case) -> tuple[int, ...]:
    """Return srun's exit codes for a case, each of them as good."""
    if case.rank == CHILD:
        return CHILD_CODES[case.fault]
    # before MPI runs no rank can end the others but through srun, whose code is the highest: that of those that it has ended
    ended = (143, 137) if case.phase == "mpi_init" else ()
    by_mpi = (ENDED_BY_MPI,) if 137 in CODES[case.fault] and debian_openmpi_major() > 4 else ()
    return (*CODES[case.fault], *ended, *by_mpi)


class SrunFaults:
    """etcd and the frontend on the login node, for all cases."""

    def __init__(self, stack: Stack, model: Path) -> None:
        self.stack, self.model = stack, model

    def run(self, case: Case, folder: Path, agents: Sequence[str] = ()) -> Outcome:
        """Start a worker, let the case happen to it, and see what is left.

        Args:
            case: what happens.
            folder: for files.
            agents: nodes whose agent is killed and must be replaced before, once streams are open.
        """
        slurm = self.stack.slurm
        # its temporary folder's name also marks all that it starts
        temporary, trigger, failures = Path(tempfile.mkdtemp(prefix="t-")), folder / "now", folder / "failures"
        config = folder / "engine.yaml"
        config.write_text(CONFIG)
        flags = ("--model", str(self.model), "--engine-config", str(config), *case.flags(failures))
        # the nodes share this machine's cores and don't know
        library = {**slurm.debian_openmpi_env, "OMPI_MCA_mpi_yield_when_idle": "1"}
        variables = {**self.stack.environment, **library, **case.environment(trigger), "TMPDIR": str(temporary)}
        placed = (f"--nodes={len(NODES)}", f"--nodelist={','.join(NODES)}", f"--ntasks-per-node={RANKS_PER_NODE}")
        srun = ("--mpi=pmix", *placed, "--distribution=block", "--kill-on-bad-exit=1")
        programs = [self.program("watch_keys.py", self.stack.etcd.url, case.namespace)]
        worker = SlurmWorker(slurm, folder, srun, flags, variables)

        def open_streams() -> Streams:
            words = (str(self.stack.frontend.port), case.namespace, str(STREAMS), str(TOKENS))
            programs.append(self.program("hold_streams.py", *words))
            return Streams(programs[-1])

        def find_rank(rank: int) -> int:
            if rank == CHILD:
                return find_child(processes_with(f"TMPDIR={temporary}\0"))
            mark = f"SLURM_PROCID={rank}\0".encode()
            pids = [pid for found in worker.ranks().values() for pid in found]
            found = [pid for pid in pids if mark in environment_of(pid)]
            # its node agent, which it has forked, looks as it does until it has a title of its own
            forked = {child for pid in found for child in children_of(pid)}
            (pid,) = [pid for pid in found if pid not in forked]
            return pid

        replaced = iter([agents])

        def replace_agents() -> None:
            for node in next(replaced, ()):
                replace_agent(functools.partial(slurm.pids, node), node)

        try:
            keys = Keys(programs[0])
            outcome = run_case(
                case,
                worker,
                trigger,
                keys,
                open_streams,
                lambda: os.kill(find_rank(0), signal.SIGTERM),
                find_rank,
                worker.stop,
                replace_agents,
            )
            outcome.left += remaining(f"TMPDIR={temporary}\0")
            # not before: node agents write them beside the log, and outlive the launcher
            outcome.reports = read_reports(failures)
            outcome.left += [f"{node}: {name}" for node in NODES for name in self.shared_memory(node)]
            # an engine that is killed leaves things of its own
            ours = "*" if case.engine == "reference" else "dynamo_mpi*"
            outcome.left += [path.name for path in temporary.glob(ours)]
            return outcome
        finally:
            worker.stop()
            for process in programs:
                end_process(process)
            shutil.rmtree(temporary)

    def host(self, rank: int) -> str:
        """Return a rank's node."""
        return NODES[rank // RANKS_PER_NODE]

    def program(self, name: str, *words: str) -> InsideProcess:
        """Start one of the programs that look on, on the login node."""
        return self.stack.slurm.popen(sys.executable, PROGRAMS / name, *words, env=OUR_MODULES)

    def shared_memory(self, node: str) -> list[str]:
        """Return what is in a node's /dev/shm."""
        return os.listdir(f"/proc/{self.stack.slurm.cluster.init_pid(node)}/root/dev/shm")


@contextmanager
def srun_faults(slurm: SlurmSession, folder: Path, model: Path) -> Iterator[SrunFaults]:
    """Run etcd and the frontend on the login node, with their files in ``folder``."""
    with running_stack(slurm, folder) as stack:
        yield SrunFaults(stack, model)
