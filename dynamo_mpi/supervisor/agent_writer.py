# SPDX-License-Identifier: Apache-2.0
"""What a node agent writes: the report to the log, the failure folder and etcd. In threads: none of them may hold up the watch."""

from __future__ import annotations

import queue
import threading
import time
from functools import partial
from typing import TYPE_CHECKING

from dynamo_mpi.common.log_levels import Level
from dynamo_mpi.common.log_writer import log_writer
from dynamo_mpi.common.threads import run_suppressed, start_thread
from dynamo_mpi.supervisor.failure_files import as_document, write_failure
from dynamo_mpi.supervisor.lease_revoker import LeaseRevoker

if TYPE_CHECKING:
    from collections.abc import Callable

    from dynamo_mpi.supervisor.agent_failures import Report
    from dynamo_mpi.supervisor.rendezvous import Rendezvous

_REPORT_SECONDS = 2.0
_FINISH_SECONDS = 2.0


class Written:
    """A report that is being written."""

    def __init__(self) -> None:
        self._done = threading.Event()

    @property
    def is_done(self) -> bool:
        """Whether it is written, or can't be."""
        return self._done.is_set()

    def set(self) -> None:
        """It is written, or can't be."""
        self._done.set()

    def wait(self) -> None:
        """Wait for that, two seconds at the most: a file system that hangs must not keep the ranks."""
        self._done.wait(_REPORT_SECONDS)


class ReportWriter:
    """Writes the report, once, and revokes leases.

    Args:
        log_dir: folder for log files; empty for none.
    """

    def __init__(self, log_dir: str) -> None:
        self._log_dir = log_dir
        self._revoker = LeaseRevoker()
        self._has_leases = False
        self._tasks: queue.SimpleQueue[Callable[[], object]] = queue.SimpleQueue()
        self._worker: threading.Thread | None = None
        self._others: list[threading.Thread] = []
        # what this process was forked from has said it
        log_writer.forget_history()

    def set_leases(self, encoded: str) -> None:
        """Take note of what the worker has in etcd, see `LeaseRevoker.set_leases`."""
        self._has_leases = True
        self._do(lambda: self._revoker.set_leases(encoded))

    def clear_leases(self) -> None:
        """Forget it: rank 0 has left in order."""
        self._has_leases = False
        self._do(self._revoker.clear)

    def revoke(self) -> None:
        """Take the worker out of discovery, soon."""
        if self._has_leases:
            self._do(self._revoker.revoke)

    def later(self, act: Callable[[], object]) -> None:
        """Do something that takes a moment, which `finish` waits for."""
        if (thread := start_thread(act)) is None:
            run_suppressed(act)
        else:
            self._others.append(thread)

    def publish(
        self,
        report: Report,
        meeting: Rendezvous,
        by: int | None,
        then: Callable[[], object] = lambda: None,
        done: Callable[[], object] = lambda: None,
        *,
        for_node: bool = False,
        first_in_etcd: bool = False,
    ) -> Written:
        """Write a report: to the log and the rank's log file, to the failure folder, and to etcd.

        Args:
            report: what to write.
            meeting: names the folder.
            by: the rank whose failure file it is, where it isn't the failed one's.
            then: called once it is in the log.
            done: called once nothing more comes of it.
            for_node: it is about this node, and no rank of it.
            first_in_etcd: write nothing where another agent has left its report there, or in the failure folder.
        """
        written = Written()

        def write() -> None:
            try:
                if first_in_etcd and self._revoker.record_failure(report.failure, report.host, report.text):
                    return
                # what reads the log may hang, and so may a file system
                self.later(partial(self._write_file, report, meeting, by, keep=first_in_etcd))
                self._log(report, meeting, for_node=for_node)
                then()
            finally:
                written.set()
                done()

        if self._has_leases and not first_in_etcd:
            self._do(lambda: self._revoker.record_failure(report.failure, report.host, report.text))
        self.later(write)
        return written

    def finish(self) -> None:
        """Wait for what is being done, two seconds at the most."""
        end = time.monotonic() + _FINISH_SECONDS
        for thread in self._others:
            thread.join(max(0.0, end - time.monotonic()))
        if self._worker is not None:
            done = threading.Event()
            self._do(done.set)
            done.wait(max(0.0, end - time.monotonic()))

    def _log(self, report: Report, meeting: Rendezvous, *, for_node: bool) -> None:
        rank = report.speaker
        if rank >= 0:
            log_writer.open_file(meeting.log_dir or self._log_dir, meeting.label, rank)
        log_writer.emit(None if for_node or rank < 0 else rank, report.speaker_host, report.text, Level.ERROR)

    @staticmethod
    def _write_file(report: Report, meeting: Rendezvous, by: int | None, *, keep: bool) -> None:
        later = [as_document(each.failure, each.host) for each in report.later]
        whole = {"report": report.text, "consequences": later}
        write_failure(meeting, report.failure, report.host, by=by, report=whole, keep=keep)

    def _do(self, act: Callable[[], object]) -> None:
        """Do it in the one thread that talks to etcd, after what was given before."""
        self._tasks.put(act)
        if self._worker is None:
            self._worker = start_thread(self._work)
            if self._worker is None:  # no more threads for this user
                run_suppressed(self._tasks.get())

    def _work(self) -> None:
        while True:
            run_suppressed(self._tasks.get())
