# SPDX-License-Identifier: Apache-2.0
"""Ends workers that nobody launched for us, by what their world records say: each in order, prefill before decode, and nothing else."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import time
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from dynamo_mpi.errors import AuthorisationError, DeadlineError, DiscoveryError, UsageError
from dynamo_mpi.launch.steps import SlurmEndings
from dynamo_mpi.operating.snapshot import read_snapshot
from dynamo_mpi.operating.wording import spell_nodes, spell_position

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from dynamo_mpi.operating.place import Place
    from dynamo_mpi.operating.views import Worker

POLL_SECONDS = 0.5
# decode still fetches KV from prefill while that drains, and the other way round it would fail
_GROUPS = (("prefill",), ("decode",))
_JOB, _STEP = re.compile(r"\d+(_\d+)?(\+\d+)?"), re.compile(r"\d+")
_WORKER = b"dynamo_mpi.worker"
# a record says when Python was up; before that come imports from a slow file system, after it nothing
_EARLIER_SECONDS, _LATER_SECONDS = 900.0, 5.0


class Target(NamedTuple):
    """Which workers are meant.

    Args:
        place: where their etcd is.
        namespace: theirs; None: any.
        model: theirs; None: any.
        job: theirs, ``JOB`` or ``JOB.STEP``; None: any.
    """

    place: Place
    namespace: str | None
    model: str | None
    job: str | None

    def workers(self) -> list[Worker]:
        """Return those that are there; raises as `read_snapshot`."""
        job, _, step = (self.job or "").partition(".")
        found = read_snapshot(self.place, self.namespace, self.model).workers
        return [w for w in found if (not job or w.job == job) and (not step or w.step == step)]


class Way(NamedTuple):
    """How a worker is asked to end.

    Args:
        worker: which.
        pid: of its rank 0, which is on this host and ours; 0 where it isn't.
        step: ``JOB.STEP``; empty where Slurm can't help.
    """

    worker: Worker
    pid: int
    step: str

    @property
    def is_one(self) -> bool:
        """Can it be asked at all?"""
        return bool(self.pid or self.step)

    def __str__(self) -> str:
        where = f"{self.worker.model} {self.worker.role} on {spell_nodes(self.worker.hosts)}"
        if self.pid:
            return f"{where}: kill -TERM {self.pid}"
        if self.step:
            return f"{where}: scancel --signal=TERM {self.step}"
        return f"{where}: its rank 0 is process {self.worker.pid} on {self.worker.host}, in no step that scancel reaches from here"

    def ask(self) -> None:
        """Ask it to finish what is in flight and end."""
        if self.pid:
            _signal(self.worker)
        elif self.step:
            SlurmEndings(self.step.partition(".")[0]).cancel_ids([self.step], "--signal=TERM")


def way_to(worker: Worker) -> Way:
    """Find out how a worker can be asked to end.

    Its own process is best, where it is here: of a step under mpirun Slurm would signal mpirun's processes, which kill their ranks.
    """
    if is_ours(worker):
        return Way(worker, worker.pid, "")
    job, step = worker.job or "", worker.step or ""
    has_step = _JOB.fullmatch(job) and _STEP.fullmatch(step) and shutil.which("scancel")
    return Way(worker, 0, f"{job}.{step}" if has_step else "")


def is_ours(worker: Worker) -> bool:
    """Is the record's process on this host, this user's, a worker, and no other that has got its number since?"""
    if worker.host != os.uname().nodename.partition(".")[0] or worker.started is None or worker.pid < 2:
        return False
    folder = Path(f"/proc/{worker.pid}")
    try:
        owner, words = folder.stat().st_uid, (folder / "cmdline").read_bytes()
        began = _boot() + int((folder / "stat").read_text().rpartition(")")[2].split()[19]) / os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError, IndexError):
        return False
    is_then = worker.started - _EARLIER_SECONDS <= began <= worker.started + _LATER_SECONDS
    return owner == os.geteuid() and _WORKER in words.split(b"\0") and is_then


def end_workers(target: Target, seconds: float, say: Callable[[str], None]) -> None:
    """End workers, and wait until they have gone.

    Args:
        target: which.
        seconds: that it may take.
        say: takes one line.

    Raises:
        DeadlineError: some are still there.
        UsageError: some can't be asked from here.
        DiscoveryError: etcd doesn't answer, before anything was done.
        AuthorisationError: the same, and it refuses us.
    """
    end = time.monotonic() + seconds
    ways = [way_to(worker) for worker in target.workers()]
    if not ways:
        say("no such worker is there")
    for group in (*_GROUPS, ()):
        own = [way for way in ways if way.is_one and _is_of(way.worker, group)]
        for way in own:
            say(f"ending {way}")
            way.ask()
        _await_end(target, own, end)
    if lost := [way for way in ways if not way.is_one]:
        raise UsageError(
            "; ".join(map(str, lost)),
            needed="the host of its rank 0, or a step of Slurm's and scancel",
            fix="dynamo-mpi down there, or end its launcher",
        )


def _is_of(worker: Worker, group: Sequence[str]) -> bool:
    grouped = [role for roles in _GROUPS for role in roles]
    return worker.role in group if group else worker.role not in grouped


def _await_end(target: Target, ways: Sequence[Way], end: float) -> None:
    keys = {way.worker.key for way in ways}
    left: Iterable[Worker] = [way.worker for way in ways]
    while keys:
        trouble = ""
        try:
            left = [worker for worker in target.workers() if worker.key in keys]
        except (DiscoveryError, AuthorisationError) as error:
            trouble = f"; {error.found}"
        if not trouble and not left and not any(way.pid and is_ours(way.worker) for way in ways):
            return
        if time.monotonic() >= end:
            now = time.time()
            stand = "; ".join(f"{w.role} on {spell_nodes(w.hosts)}: {spell_position(w, now)}" for w in left)
            raise DeadlineError(
                f"not ended in time: {stand or 'its process is still there'}{trouble}",
                fix="a longer --timeout where requests take longer, or end its launcher",
            )
        time.sleep(max(0.0, min(POLL_SECONDS, end - time.monotonic())))


def _signal(worker: Worker) -> None:
    """Signal the process that was looked at, and none that gets its number meanwhile."""
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
