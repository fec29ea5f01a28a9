# SPDX-License-Identifier: Apache-2.0
"""Stop workers that `launch` did not start, found by their worker records: each in order, prefill before decode, and nothing else."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import time
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from dynamo_mpi.common.errors import AuthorizationError, DiscoveryError, PhaseTimeoutError, UsageError
from dynamo_mpi.deploy.steps import SlurmStepController
from dynamo_mpi.ops.format import format_nodes, format_position
from dynamo_mpi.ops.status import read_status

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from dynamo_mpi.discovery.records import StoredRecord, WorkerRecord
    from dynamo_mpi.ops.deployment import Deployment

POLL_SECONDS = 0.5
# decode still fetches KV from prefill while that drains, and the other way round it would fail
_GROUPS = (("prefill",), ("decode",))
_JOB, _STEP = re.compile(r"\d+(_\d+)?(\+\d+)?"), re.compile(r"\d+")
_WORKER = b"dynamo_mpi.worker"
# a record says when Python was up; before that come imports from a slow file system, after it nothing
_EARLIER_SECONDS, _LATER_SECONDS = 900.0, 5.0


class WorkerSelector(NamedTuple):
    """Which workers are meant.

    Args:
        deployment: theirs.
        namespace: theirs; None: any.
        model: theirs; None: any.
        job: theirs, ``JOB`` or ``JOB.STEP``; None: any.
    """

    deployment: Deployment
    namespace: str | None
    model: str | None
    job: str | None

    def workers(self) -> list[StoredRecord]:
        """Return those that exist; raises as `read_status`."""
        job, _, step = (self.job or "").partition(".")
        found = read_status(self.deployment, self.namespace, self.model).workers
        return [w for w in found if (not job or w.record.job == job) and (not step or w.record.step == step)]


class StopMethod(NamedTuple):
    """How a worker is asked to stop.

    Args:
        worker: which.
        pid: of its rank 0, which is on this host and ours; 0 if it isn't.
        step: ``JOB.STEP``; empty if Slurm can't help.
    """

    worker: StoredRecord
    pid: int
    step: str

    @property
    def exists(self) -> bool:
        """Whether it can be asked at all."""
        return bool(self.pid or self.step)

    def __str__(self) -> str:
        record = self.worker.record
        where = f"{record.model} {record.role} on {format_nodes(record.hosts)}"
        if self.pid:
            return f"{where}: kill -TERM {self.pid}"
        if self.step:
            return f"{where}: scancel --signal=TERM {self.step}"
        return (
            f"{where}: its rank 0 is process {record.pid} on {record.host}, in no step that scancel reaches from here"
        )

    def stop(self) -> None:
        """Ask it to finish the requests in flight and end."""
        if self.pid:
            _signal(self.worker.record)
        elif self.step:
            SlurmStepController(self.step.partition(".")[0]).cancel_ids([self.step], "--signal=TERM")


def stop_method_for(worker: StoredRecord) -> StopMethod:
    """Find out how a worker can be asked to stop.

    Its own process is best, if it is here: of a step under mpirun Slurm would signal mpirun's processes, which kill their ranks.
    """
    record = worker.record
    if is_ours(record):
        return StopMethod(worker, record.pid, "")
    job, step = record.job or "", record.step or ""
    has_step = _JOB.fullmatch(job) and _STEP.fullmatch(step) and shutil.which("scancel")
    return StopMethod(worker, 0, f"{job}.{step}" if has_step else "")


def is_ours(worker: WorkerRecord) -> bool:
    """Return whether the record's process is on this host, this user's, a worker, and not another that has its number now."""
    if worker.host != os.uname().nodename.partition(".")[0] or not worker.started or worker.pid < 2:
        return False
    folder = Path(f"/proc/{worker.pid}")
    try:
        owner, words = folder.stat().st_uid, (folder / "cmdline").read_bytes()
        began = _boot() + int((folder / "stat").read_text().rpartition(")")[2].split()[19]) / os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError, IndexError):
        return False
    is_then = worker.started - _EARLIER_SECONDS <= began <= worker.started + _LATER_SECONDS
    return owner == os.geteuid() and _WORKER in words.split(b"\0") and is_then


def stop_workers(selector: WorkerSelector, seconds: float, log: Callable[[str], None]) -> None:
    """Stop workers, and wait until they have ended.

    Args:
        selector: which.
        seconds: that it may take.
        log: takes one line.

    Raises:
        PhaseTimeoutError: some still exist.
        UsageError: some can't be asked from here.
        DiscoveryError: etcd doesn't answer, before anything was done.
        AuthorizationError: the same, and it refuses us.
    """
    end = time.monotonic() + seconds
    methods = [stop_method_for(worker) for worker in selector.workers()]
    if not methods:
        log("no such worker is there")
    for group in (*_GROUPS, ()):
        own = [method for method in methods if method.exists and _is_of(method.worker.record, group)]
        for method in own:
            log(f"ending {method}")
            method.stop()
        _await_end(selector, own, end)
    if lost := [method for method in methods if not method.exists]:
        raise UsageError(
            "; ".join(map(str, lost)),
            needed="the host of its rank 0, or a step of Slurm's and scancel",
            fix="dynamo-mpi down there, or end its launcher",
        )


def _is_of(worker: WorkerRecord, group: Sequence[str]) -> bool:
    grouped = [role for roles in _GROUPS for role in roles]
    return worker.role in group if group else worker.role not in grouped


def _await_end(selector: WorkerSelector, methods: Sequence[StopMethod], end: float) -> None:
    keys = {method.worker.key for method in methods}
    left: Iterable[StoredRecord] = [method.worker for method in methods]
    while keys:
        problem = ""
        try:
            left = [worker for worker in selector.workers() if worker.key in keys]
        except (DiscoveryError, AuthorizationError) as error:
            problem = f"; {error.found}"
        if not problem and not left and not any(m.pid and is_ours(m.worker.record) for m in methods):
            return
        if time.monotonic() >= end:
            now, records = time.time(), [worker.record for worker in left]
            listed = "; ".join(f"{w.role} on {format_nodes(w.hosts)}: {format_position(w, now)}" for w in records)
            raise PhaseTimeoutError(
                f"not ended in time: {listed or 'its process is still there'}{problem}",
                fix="a longer --timeout where requests take longer, or end its launcher",
            )
        time.sleep(max(0.0, min(POLL_SECONDS, end - time.monotonic())))


def _signal(worker: WorkerRecord) -> None:
    """Signal the process that was checked, and no other that gets its number meanwhile."""
    with contextlib.suppress(OSError):  # it has gone
        if not hasattr(os, "pidfd_open"):  # a Python that was built for older kernels, as conda's
            if is_ours(worker):
                os.kill(worker.pid, signal.SIGTERM)
            return
        descriptor = os.pidfd_open(worker.pid)
        try:
            if is_ours(worker):
                signal.pidfd_send_signal(descriptor, signal.SIGTERM)
        finally:
            os.close(descriptor)


def _boot() -> float:
    """Return when the machine was started, as /proc counts from it."""
    return time.time() - time.clock_gettime(time.CLOCK_BOOTTIME)
