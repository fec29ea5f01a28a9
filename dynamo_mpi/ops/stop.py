# SPDX-License-Identifier: Apache-2.0
"""Stops workers that `launch` did not start, found by their worker records: each in order, prefill before decode, and nothing else."""

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
from dynamo_mpi.ops.readiness import format_nodes, format_position
from dynamo_mpi.ops.status import read_status

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from dynamo_mpi.discovery.records import StoredRecord, WorkerRecord
    from dynamo_mpi.ops.deployment import Deployment

POLL_SECONDS = 0.5
# decode still fetches KV from prefill while prefill drains; in the other order that would fail
_GROUPS = (("prefill",), ("decode",))
_JOB, _STEP = re.compile(r"\d+(_\d+)?(\+\d+)?"), re.compile(r"\d+")
_WORKER = b"dynamo_mpi.worker"
# a record has the time after Python's start; imports from a slow file system may come before it, nothing after it
_EARLIER_SECONDS, _LATER_SECONDS = 900.0, 5.0


class WorkerSelector(NamedTuple):
    """Selects workers.

    Args:
        deployment: their deployment.
        namespace: their namespace; None for any.
        model: their model; None for any.
        job: their job, ``JOB`` or ``JOB.STEP``; None for any.
    """

    deployment: Deployment
    namespace: str | None
    model: str | None
    job: str | None

    def workers(self) -> list[StoredRecord]:
        """Return the selected workers that exist; raises like `read_status`."""
        job, _, step = (self.job or "").partition(".")
        found = read_status(self.deployment, self.namespace, self.model).workers
        return [w for w in found if (not job or w.record.job == job) and (not step or w.record.step == step)]


class StopMethod(NamedTuple):
    """How to stop a worker.

    Args:
        worker: its record.
        pid: its rank 0's process id, if that is this user's on this host; otherwise 0.
        step: ``JOB.STEP``; empty if Slurm can't signal it.
    """

    worker: StoredRecord
    pid: int
    step: str

    @property
    def exists(self) -> bool:
        """Whether the worker can be stopped from here."""
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
        """Request that it drains and ends."""
        if self.pid:
            _signal(self.worker.record)
        elif self.step:
            SlurmStepController(self.step.partition(".")[0]).cancel_ids([self.step], "--signal=TERM")


def stop_method_for(worker: StoredRecord) -> StopMethod:
    """Return how to stop a worker.

    A signal to rank 0's process is preferred: in a step with mpirun, Slurm would signal mpirun's processes, which kill their ranks.
    """
    record = worker.record
    if is_ours(record):
        return StopMethod(worker, record.pid, "")
    job, step = record.job or "", record.step or ""
    has_step = _JOB.fullmatch(job) and _STEP.fullmatch(step) and shutil.which("scancel")
    return StopMethod(worker, 0, f"{job}.{step}" if has_step else "")


def is_ours(worker: WorkerRecord) -> bool:
    """Return whether the record's process is on this host, is this user's, and is still the same worker, not another process with its id."""
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
        selector: selects the workers.
        seconds: time limit.
        log: prints one line.

    Raises:
        PhaseTimeoutError: some still exist.
        UsageError: some can't be stopped from here.
        DiscoveryError: etcd doesn't answer; nothing was done.
        AuthorizationError: etcd rejects our credentials; nothing was done.
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
            expected="the host of its rank 0, or a step of Slurm's and scancel",
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
            problem = f"; {error.problem}"
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
    """Signal the process that was checked, never another that has got its id meanwhile."""
    with contextlib.suppress(OSError):  # it has exited
        if not hasattr(os, "pidfd_open"):  # a Python built for older kernels, such as conda's
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
    """Return the machine's boot time, to which times in /proc are relative."""
    return time.time() - time.clock_gettime(time.CLOCK_BOOTTIME)
