# SPDX-License-Identifier: Apache-2.0
"""Writes a node agent's report to the log, the failure directory and etcd. In threads, because none of these may block the agent."""

from __future__ import annotations

import queue
import threading
import time
from functools import partial

from dynamo_mpi.common.light_typing import TYPE_CHECKING, Any
from dynamo_mpi.common.log_record import Level
from dynamo_mpi.common.log_writer import log_writer
from dynamo_mpi.common.waiting import run_suppressed, start_thread
from dynamo_mpi.supervisor.failure_reports import as_document, load_writer, write_failure
from dynamo_mpi.supervisor.leases import LeaseRevoker

if TYPE_CHECKING:
    from collections.abc import Callable

    from dynamo_mpi.supervisor.agent_failures import Report
    from dynamo_mpi.supervisor.rendezvous import Rendezvous

_REPORT_SECONDS = 2.0
_FINISH_SECONDS = 2.0
# a file system that hangs must not keep the other ranks
_FILE_SECONDS = 0.25
# nor an etcd that hangs
_ETCD_SECONDS = 0.75


class PendingReport:
    """A report that a thread is writing."""

    def __init__(self) -> None:
        self._done = threading.Event()

    @property
    def is_done(self) -> bool:
        """Whether writing has finished or failed."""
        return self._done.is_set()

    def set(self) -> None:
        """Mark the report as written or failed."""
        self._done.set()

    def wait(self) -> None:
        """Wait until the report is written, at most 2 s: a hanging file system must not block the ranks."""
        self._done.wait(_REPORT_SECONDS)


class ReportWriter:
    """Writes reports and revokes leases.

    Args:
        log_dir: directory for log files; empty for none.
    """

    def __init__(self, log_dir: str) -> None:
        self._log_dir = log_dir
        self._revoker = LeaseRevoker()
        self._has_leases = False
        self._tasks: queue.SimpleQueue[Callable[[], object]] = queue.SimpleQueue()
        self._worker: threading.Thread | None = None
        self._helpers: list[threading.Thread] = []
        # drop the log history of the process that was forked
        log_writer.forget_history()

    def set_leases(self, encoded: str) -> None:
        """Set the leases that the worker owns in etcd, see `LeaseRevoker.set_leases`."""
        self._has_leases = True
        self._run_in_order(lambda: self._revoker.set_leases(encoded))
        # in the same thread: it is after the result, and no rank waits for it
        self._run_in_order(load_writer)

    def clear_leases(self) -> None:
        """Drop the leases: rank 0 shut down in order."""
        self._has_leases = False
        self._run_in_order(self._revoker.clear)

    def revoke(self) -> None:
        """Deregister the worker by revoking its leases, in a thread."""
        if self._has_leases:
            self._run_in_order(self._revoker.revoke)

    def later(self, task: Callable[[], object]) -> threading.Thread | None:
        """Run a slow task in a thread, and return that; `finish` waits for it. Without threads, the task has run."""
        if (thread := start_thread(task)) is None:
            run_suppressed(task)
        else:
            self._helpers.append(thread)
        return thread

    def publish(
        self,
        report: Report,
        rendezvous: Rendezvous,
        by: int | None,
        on_logged: Callable[[], object] = lambda: None,
        on_done: Callable[[], object] = lambda: None,
        *,
        for_node: bool = False,
        only_if_first: bool = False,
    ) -> PendingReport:
        """Write a report to the log, to the rank's log file, to the failure directory and to etcd.

        Args:
            report: the report.
            rendezvous: names the failure directory.
            by: the rank whose failure file it becomes; None for the failed rank's.
            on_logged: called after the report is logged, written to the failure directory and the leases are revoked, if those don't hang.
            on_done: called after everything is done.
            for_node: the report is about this node, not about one of its ranks.
            only_if_first: write nothing if another agent has written its report to etcd or to the failure directory.
        """
        pending = PendingReport()

        def write() -> None:
            try:
                if only_if_first and self._revoker.record_failure(report.failure, report.host, report.text):
                    return
                # separately: the reader of the log may hang, and so may a file system
                file = self.later(partial(self._write_file, report, rendezvous, by, keep=only_if_first))
                self._log(report, rendezvous, for_node=for_node)
                if file is not None:
                    # what follows ends all ranks, and under Slurm this process too
                    file.join(_FILE_SECONDS)
                if self._has_leases:
                    self._await_etcd(_ETCD_SECONDS)
                on_logged()
            finally:
                pending.set()
                on_done()

        if self._has_leases and not only_if_first:
            self._run_in_order(lambda: self._revoker.record_failure(report.failure, report.host, report.text))
        self.later(write)
        return pending

    def finish(self) -> None:
        """Wait for the tasks that are running, at most 2 s."""
        end = time.monotonic() + _FINISH_SECONDS
        for thread in self._helpers:
            thread.join(max(0.0, end - time.monotonic()))
        if self._worker is not None:
            self._await_etcd(max(0.0, end - time.monotonic()))

    def _await_etcd(self, seconds: float) -> None:
        finished = threading.Event()
        self._run_in_order(finished.set)
        finished.wait(seconds)

    def _log(self, report: Report, rendezvous: Rendezvous, *, for_node: bool) -> None:
        rank = report.reporter
        if rank >= 0:
            log_writer.open_file(rendezvous.log_dir or self._log_dir, rendezvous.label, rank)
        log_writer.emit(None if for_node or rank < 0 else rank, report.reporter_host, report.text, Level.ERROR)

    @staticmethod
    def _write_file(report: Report, rendezvous: Rendezvous, by: int | None, *, keep: bool) -> None:
        later = [as_document(each.failure, each.host) for each in report.consequences]
        whole: dict[str, Any] = {"report": report.text, "consequences": later}
        if report.gpu_errors:
            whole["gpu_errors"] = [error.as_document(report.failure.at) for error in report.gpu_errors]
        write_failure(rendezvous, report.failure, report.host, by=by, report=whole, keep=keep)

    def _run_in_order(self, task: Callable[[], object]) -> None:
        """Run a task in the one thread that uses etcd, after the earlier tasks."""
        self._tasks.put(task)
        if self._worker is None:
            self._worker = start_thread(self._run_tasks)
            if self._worker is None:  # thread limit of this user reached
                run_suppressed(self._tasks.get())

    def _run_tasks(self) -> None:
        while True:
            run_suppressed(self._tasks.get())
