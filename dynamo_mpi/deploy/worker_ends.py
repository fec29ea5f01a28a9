# SPDX-License-Identifier: Apache-2.0
"""Reads a worker's end: whether it was one in order, what its ranks have reported, and which rank and host it comes from."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from dynamo_mpi.deploy.blame import Blame, Evidence, blame
from dynamo_mpi.deploy.first_death import ended_task, first_death
from dynamo_mpi.deploy.reports import Beginning, Report, Trace, is_reported, report_death, trace_in_etcd
from dynamo_mpi.supervisor.failure_reports import SILENT_HOST

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from dynamo_mpi.deploy.run_dir import RunDir
    from dynamo_mpi.deploy.steps import Step

# rank 0's last log line in an orderly end
GOODBYE = "exit: done"
# after a report; srun names the rank that ended first within this time; where a host is lost, it can't
LINGER_SECONDS = 2.0
# after the end of a rank, without a report: the others, and its node agent, write it meanwhile
SILENT_LINGER_SECONDS = 5.0
# of a launcher that ends the other ranks itself; mpirun first loses the connection to a host, srun kills ranks after KillWait
HANG_SECONDS = 60.0


class WorkerEnd(NamedTuple):
    """A worker's end that wasn't requested.

    Args:
        step: its step, which has ended.
        code: its exit code.
        beginning: its start.
        lost: those of its nodes that are known to be lost, and why.
        was_ready: whether it had become ready.
    """

    step: Step
    code: int
    beginning: Beginning
    lost: Mapping[str, str]
    was_ready: bool = False

    def examine(
        self, clients: Mapping[str, str], clear: Callable[[], None], say: Callable[[str], None]
    ) -> tuple[Blame, Report | None]:
        """Find out why it ended; report it, if no process of its own has.

        Args:
            clients: addresses and credentials of the services.
            clear: deregisters the worker and ends what is left of its step; called when the records in etcd have been read.
            say: prints one line.

        Returns:
            The first cause, and the launcher's own report; None if the ranks have reported.
        """
        output, beginning, report = self.step.child.output(), self.beginning, None
        is_printed = is_reported(self.code, output)
        is_known = is_printed or beginning.has_files
        if not is_printed and (written := beginning.written()):
            say(f"{self.step.name}: {written}")
        trace = Trace() if is_known else trace_in_etcd(beginning, clients)
        clear()
        if not is_known:
            report = report_death(beginning, self.step, self.code, trace, clients, self.lost)
        worker, death = beginning.worker, first_death(output)
        evidence = Evidence(
            self.code,
            worker.nodes,
            beginning.reports(),
            None if death is None else death.placed(worker.nodes, worker.ranks_per_node),
            trace.phase or ("serve" if self.was_ready else ""),
            tuple(self.lost),
            worker.ranks_per_node,
            is_reported=report is None,
        )
        return blame(evidence), report


def is_disorderly(name: str, step: Step, run_dir: RunDir) -> bool:
    """Return whether exit code 0 hides a failure: Open MPI 5's mpirun has no other code for a lost host. A worker that ends in order removes
    its ready file, and rank 0 logs its last line."""
    if GOODBYE in step.last_words(200):
        return False
    return run_dir.is_ready(name) or first_death(step.child.output()) is not None


def last_silence(step: Step) -> str:
    """Return the last warning of a worker's ranks that a host doesn't answer; empty if there is none."""
    return next((line for line in reversed(step.child.last_lines(50)) if SILENT_HOST in line), "")


def seconds_left(step: Step, beginning: Beginning, *, may_hang: bool) -> float:
    """Return how long a worker's launcher may run on from now; infinite while no failure of its ranks is known.

    Args:
        step: its step, which runs.
        beginning: its start.
        may_hang: whether the launcher doesn't end the other ranks when one ends.
    """
    if beginning.has_files:
        return LINGER_SECONDS if may_hang else HANG_SECONDS
    if may_hang and ended_task(step.last_words(200)) is not None:
        return SILENT_LINGER_SECONDS
    return float("inf")
