# SPDX-License-Identifier: Apache-2.0
"""Stops workers that `launch` did not start, found by their worker records: each in order, prefill before decode, and nothing else."""

from __future__ import annotations

import re
import shutil
import signal
import time
from typing import TYPE_CHECKING, NamedTuple

from dynamo_mpi.common.display import sanitize
from dynamo_mpi.common.errors import AuthorizationError, DiscoveryError, PhaseTimeoutError, UsageError
from dynamo_mpi.common.process import host_name
from dynamo_mpi.common.waiting import poll_until
from dynamo_mpi.common.worker_process import ProcessStart, is_worker, signal_worker
from dynamo_mpi.deploy.steps import SlurmStepController, is_step_name
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

    def methods(self) -> list[StopMethod]:
        """Return how to stop them; raises like `workers`."""
        return stop_methods(self.workers(), self.job)


class StopMethod(NamedTuple):
    """How to stop a worker.

    Args:
        worker: its record.
        pid: its rank 0's process id, if that is this user's on this host; otherwise 0.
        step: ``JOB.STEP``; empty if Slurm can't signal it.
        doubt: why the record's step isn't signalled; empty if it names none.
    """

    worker: StoredRecord
    pid: int
    step: str
    doubt: str = ""

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
        why = self.doubt or "in no step that scancel reaches from here"
        return f"{where}: its rank 0 is process {record.pid} on {record.host}, {why}"

    def stop(self) -> None:
        """Request that it drains and ends."""
        if self.pid:
            signal_worker(self.pid, _start_of(self.worker.record), signal.SIGTERM)
        elif self.step:
            SlurmStepController(self.step.partition(".")[0]).cancel_ids([self.step], "--signal=TERM")


def stop_methods(workers: Sequence[StoredRecord], named_step: str | None = None) -> list[StopMethod]:
    """Return how to stop workers.

    A signal to rank 0's process is preferred: in a step with mpirun, Slurm would signal mpirun's processes, which kill their ranks. Who may
    write to etcd may write any step into a record: a step is signalled only if `launch` has named it, or if the user names it.

    Args:
        workers: their records.
        named_step: the step that the user named, ``JOB.STEP``.
    """
    listed: dict[str, dict[str, str] | None] = {}
    return [_stop_method(worker, named_step, listed) for worker in workers]


def _stop_method(worker: StoredRecord, named_step: str | None, listed: dict[str, dict[str, str] | None]) -> StopMethod:
    record = worker.record
    if is_ours(record):
        return StopMethod(worker, record.pid, "")
    job, step = record.job or "", f"{record.job}.{record.step}"
    if not (_JOB.fullmatch(job) and _STEP.fullmatch(record.step or "") and shutil.which("scancel")):
        return StopMethod(worker, 0, "")
    if step == named_step:
        return StopMethod(worker, 0, step)
    if job not in listed:
        listed[job] = SlurmStepController(job).running()
    name = (listed[job] or {}).get(step)
    if name is None:
        state = "doesn't answer" if listed[job] is None else "doesn't list it"
        return StopMethod(worker, 0, "", f"and its step {step} isn't known to be a worker's, as Slurm {state}")
    if is_step_name(name) and name == record.launch:
        return StopMethod(worker, 0, step)
    shown = sanitize(name, 40)
    doubt = (
        f"and its step {step} has the name {shown!r}, not one that launch gives; if it is the worker's: --job {step}"
    )
    return StopMethod(worker, 0, "", doubt)


def is_ours(worker: WorkerRecord) -> bool:
    """Return whether the record's process is on this host, is this user's, and is still the same worker, not another process with its id."""
    return worker.host == host_name() and is_worker(worker.pid, _start_of(worker))


def _start_of(worker: WorkerRecord) -> ProcessStart:
    return ProcessStart(worker.started, worker.process_start)


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
    methods = selector.methods()
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
            expected="the host of its rank 0; or scancel, and a step that launch or --job JOB.STEP has named",
            fix="dynamo-mpi down there, --job JOB.STEP, or end its launcher",
        )


def _is_of(worker: WorkerRecord, group: Sequence[str]) -> bool:
    grouped = [role for roles in _GROUPS for role in roles]
    return worker.role in group if group else worker.role not in grouped


def _await_end(selector: WorkerSelector, methods: Sequence[StopMethod], end: float) -> None:
    keys = {method.worker.key for method in methods}
    left: Iterable[StoredRecord] = [method.worker for method in methods]
    problem = ""

    def late() -> PhaseTimeoutError:
        now, records = time.time(), [worker.record for worker in left]
        listed = "; ".join(f"{w.role} on {format_nodes(w.hosts)}: {format_position(w, now)}" for w in records)
        return PhaseTimeoutError(
            f"not ended in time: {listed or 'its process is still there'}{problem}",
            expected="an end of all workers within --timeout",
            fix="a longer --timeout where requests take longer, or end its launcher",
        )

    for _ in poll_until(end, POLL_SECONDS, late) if keys else ():
        problem = ""
        try:
            left = [worker for worker in selector.workers() if worker.key in keys]
        except (DiscoveryError, AuthorizationError) as error:
            problem = f"; {error.problem}"
        if not problem and not left and not any(m.pid and is_ours(m.worker.record) for m in methods):
            return
