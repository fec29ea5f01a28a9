# SPDX-License-Identifier: Apache-2.0
"""A report for every death: where a worker's ranks have left none, the launcher writes it, by what srun or mpirun says went first."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import re
import signal
import time
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from dynamo_mpi.common.errors import DynamoMpiError
from dynamo_mpi.common.exit_codes import ExitCode
from dynamo_mpi.common.failure import DetectedBy, Failure
from dynamo_mpi.deploy.first_death import Death, first_death, spell_signal
from dynamo_mpi.discovery.etcd_http import query_etcd
from dynamo_mpi.discovery.failure_records import WorkerIdentity, create_if_absent, failure_record, list_failures
from dynamo_mpi.discovery.records import LAUNCH_VARIABLE, list_workers
from dynamo_mpi.mpi.restart_count import restart_count
from dynamo_mpi.supervisor.failure_files import write_failure
from dynamo_mpi.supervisor.rendezvous import Rendezvous

if TYPE_CHECKING:
    from collections.abc import Mapping

    from dynamo_mpi.deploy.command import Command
    from dynamo_mpi.deploy.deployment import Worker
    from dynamo_mpi.deploy.steps import Step
    from dynamo_mpi.discovery.etcd import EtcdClient

# a node agent may still be writing what its ranks can't say any more
GRACE_SECONDS = 2.0
_LOOK_SECONDS = 0.05
_ETCD_SECONDS = 2.0
# the ranks', and their node agents', in text and as JSON
_REPORT = re.compile(
    r'dynamo_mpi: (?:rank \d+ on )?\S+: (?:error\b|preflight: \d+ errors?\b|exit: code \d)|"level":"ERROR","target":"dynamo_mpi"'
)
# a process that leaves with these has said why, and was asked for something that can't be
MISTAKES = frozenset(
    {ExitCode.USAGE, ExitCode.DATA, ExitCode.NO_MODEL, ExitCode.NOT_AUTHORISED, ExitCode.ILLEGAL_LAYOUT}
)


class Beginning(NamedTuple):
    """One start of a worker.

    Args:
        worker: which.
        origin: what a failure record says of it, as far as its command line tells.
        failures: its folder for failure files, as this host sees it; None where it isn't known.
        earlier: the files that were there before.
    """

    worker: Worker
    origin: WorkerIdentity
    failures: Path | None
    earlier: frozenset[tuple[str, int, int]]

    @classmethod
    def of(cls, worker: Worker, command: Command, environ: Mapping[str, str], failures: Path) -> Beginning:
        """Take note of a start.

        Args:
            worker: which.
            command: what is run.
            environ: the whole environment that it gets.
            failures: the folder that it is given by default.
        """
        words = command.words
        named = [
            folder for folder in _values(words, "--failure-dir") if not folder.endswith(f"/failures/{worker.name}")
        ]
        # one of the user's own; in an image it may be anywhere
        folder = Path(named[-1]) if named else failures
        origin = _origin(worker, words, environ)
        return cls(worker, origin, folder, _files(folder))

    @property
    def has_files(self) -> bool:
        """Has a rank written a failure file since?"""
        return self.failures is not None and bool(_files(self.failures) - self.earlier)

    def written(self) -> str:
        """Return what the ranks have written of the first cause, for where it isn't in their output: Open MPI 5's mpirun may drop that once
        a rank has left with an error. Empty where there is nothing."""
        reports = []
        for name, _, _ in _files(self.failures) - self.earlier if self.failures is not None else ():
            with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
                content = json.loads((Path(self.failures or "") / name).read_text(encoding="utf-8"))
                text = f"rank {content['rank']} on {content['host']}: {content['report']}"
                reports.append((float(content["time"]), text))
        return min(reports, default=(0.0, ""))[1]


class Trace(NamedTuple):
    """What etcd knows of a start.

    Args:
        origin: whose; None where it has, or had, no record.
        record: its record's lease; 0 for none.
        phase: that the record names.
        is_reported: somebody has left word of a failure.
        answered: etcd did, and lets us in.
    """

    origin: WorkerIdentity | None = None
    record: int = 0
    phase: str = ""
    is_reported: bool = False
    answered: bool = True


class Report(NamedTuple):
    """What the launcher says in the ranks' place.

    Args:
        found: what has happened.
        needed: what has to be true instead.
        fix: what to do.
    """

    found: str
    needed: str
    fix: str

    def __str__(self) -> str:
        return f"{self.found}\n  needed: {self.needed}\n  do:     {self.fix}"


def is_reported(code: int, words: str) -> bool:
    """Tell whether a worker's own processes have said why it ended. Pure.

    Args:
        code: of its launcher.
        words: what the step has printed.
    """
    return code in MISTAKES or _REPORT.search(words) is not None


def trace_in_etcd(beginning: Beginning, environ: Mapping[str, str]) -> Trace:
    """Look what etcd knows of a start, before its record is taken away. Takes no longer than two seconds; does not raise."""
    try:
        return query_etcd(environ, _ETCD_SECONDS, lambda etcd: _trace(beginning.origin, etcd))
    except DynamoMpiError:
        return Trace(answered=False)


def report_death(
    beginning: Beginning, step: Step, code: int, trace: Trace, environ: Mapping[str, str]
) -> Report | None:
    """Report the death of a worker that none of its own processes has reported: return it, and leave it in etcd and in a failure file.

    Args:
        beginning: which start.
        step: that has ended.
        code: that the worker ended with.
        trace: what etcd knew of it at its end.
        environ: where etcd and our credentials stand.

    Returns:
        What has happened; None where the ranks, or their node agents, have reported it.
    """
    end = time.monotonic() + GRACE_SECONDS
    while not (is_heard := trace.is_reported or beginning.has_files) and time.monotonic() < end:
        time.sleep(_LOOK_SECONDS)
    if is_heard:
        return None
    worker = beginning.worker
    words = step.child.output()
    death = first_death(words)
    if death is not None:
        death = death.placed(worker.nodes, worker.ranks_per_node)
    report = _report(worker.name, code, death, step)
    failure = Failure(
        death.ranks[0] if death is not None and len(death.ranks) == 1 else -1,
        # 0 is what a launcher may say of a lost host, and no failure's code
        code or ExitCode.TEMPORARY,
        report.found,
        DetectedBy.DISCONNECT,
        trace.phase,
        time.monotonic(),
    )
    host = death.host if death is not None else ""
    origin = trace.origin or beginning.origin
    content = failure_record(origin, failure, host, str(report))
    # where etcd can't be asked, it is said, and written down, all the same
    with contextlib.suppress(DynamoMpiError):
        if trace.answered and not query_etcd(
            environ,
            _ETCD_SECONDS,
            lambda etcd: not _is_left(origin, etcd) and create_if_absent(etcd, content, trace.record),
        ):
            return None
    if beginning.failures is not None:
        meeting = Rendezvous(os.uname().nodename, failure_dir=str(beginning.failures), label=origin.component)
        more = {"report": str(report), "consequences": [], "attempt": origin.attempt}
        write_failure(meeting, failure, host, by=0, report=more)
    return report


def _report(name: str, code: int, death: Death | None, step: Step) -> Report:
    number = -step.child.popen.returncode
    if death is None and number > 0:
        who = f"its launcher was killed by {spell_signal(number)}"
        found = f"{name} ended with exit code {code}: {who}, and its ranks left no report"
        return Report(
            found, "a launcher that lives as long as its ranks", "find out who killed it: the kernel, or an operator"
        )
    if death is None:
        found = f"{name} ended with exit code {code}, its ranks left no report, and its launcher doesn't say what became of them"
        return Report(found, "ranks that serve until they are asked to end", f"read the end of {step.child.log}")
    found = f"{name} ended with exit code {code}: {death}, and no rank was left to report it"
    where = f" on {death.host}" if death.host else ""
    if death.signal == signal.SIGKILL:
        fix = f"find out who killed it: the kernel's log{where} (memory that ran out), Slurm, or an operator"
    elif death.signal:
        fix = f"read what it said before, in {step.child.log}; the kernel's log{where} and a core file tell more"
    else:
        fix = f"read what was said before, in {step.child.log}" + (f", and look at {death.host}" if death.host else "")
    return Report(found, "ranks that live until all of them are asked to end", fix)


def _trace(origin: WorkerIdentity, etcd: EtcdClient) -> Trace:
    trace = Trace()
    for worker in list_workers(etcd)[0]:
        record = worker.record
        if (record.launch, record.attempt) == (origin.launch, origin.attempt):
            trace = Trace(WorkerIdentity.of(record), worker.lease, record.phase)
    return trace._replace(is_reported=_is_left(origin, etcd))


def _is_left(origin: WorkerIdentity, etcd: EtcdClient) -> bool:
    start = (origin.launch, origin.attempt)
    return any((stored.record.launch, stored.record.attempt) == start for stored in list_failures(etcd)[0])


def _origin(worker: Worker, words: tuple[str, ...], environ: Mapping[str, str]) -> WorkerIdentity:
    """Return whose failure it is where the worker has no record: what its ranks would make of their flags and variables."""

    def setting(flag: str, variable: str, default: str) -> str:
        return (_values(words, flag) or [environ.get(variable) or default])[-1]

    namespace = setting("--namespace", "DYN_NAMESPACE", "dynamo")
    component = setting("--component", "DYN_COMPONENT", worker.role if worker.role == "prefill" else "backend")
    endpoint = setting("--endpoint", "DYN_ENDPOINT", f"dyn://{namespace}.{component}.generate")
    parts = endpoint.removeprefix("dyn://").split(".")
    if len(parts) == 3:
        namespace, component, _ = parts
    model = environ.get("SERVED_MODEL_NAME") or Path(environ.get("MODEL_PATH", "")).name or "-"
    launch, job = environ.get(LAUNCH_VARIABLE), environ.get("SLURM_JOB_ID")
    return WorkerIdentity(
        worker.role, component, namespace, endpoint, model, launch, job or None, None, restart_count(environ)
    )


def _values(words: tuple[str, ...], flag: str) -> list[str]:
    values = [word.removeprefix(f"{flag}=") for word in words if word.startswith(f"{flag}=")]
    return values + [word for before, word in itertools.pairwise(words) if before == flag]


def _files(folder: Path) -> frozenset[tuple[str, int, int]]:
    """Return the failure files there, with what changes where one is written anew."""
    found = []
    try:
        for entry in os.scandir(folder):
            if entry.name.endswith(".json") and not entry.name.startswith("."):
                status = entry.stat()
                found.append((entry.name, status.st_ino, status.st_mtime_ns))
    except OSError:  # not made yet, or on another host
        pass
    return frozenset(found)
