# SPDX-License-Identifier: Apache-2.0
"""What the launcher does for a worker of which all processes ended without doing it: it reports the failure, and deregisters the worker.

If one of the worker's node agents survives, the agent does both, see `supervisor.leases`.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import re
import signal
import time
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple

from dynamo_mpi.common.errors import MISTAKES, DynamoMpiError, ExitCode
from dynamo_mpi.common.failure import DetectedBy, Failure
from dynamo_mpi.common.own_files import read_own
from dynamo_mpi.deploy.blame import RankReport
from dynamo_mpi.deploy.first_death import Death, first_death, spell_signal
from dynamo_mpi.discovery.etcd_http import query_etcd
from dynamo_mpi.discovery.failure_records import WorkerIdentity, create_if_absent, failure_record, list_failures
from dynamo_mpi.discovery.records import LAUNCH_VARIABLE, list_workers
from dynamo_mpi.mpi.launcher import restart_count
from dynamo_mpi.supervisor.failure_reports import write_failure
from dynamo_mpi.supervisor.rendezvous import Rendezvous

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from dynamo_mpi.deploy.nodes import Worker
    from dynamo_mpi.deploy.step_commands import Command
    from dynamo_mpi.deploy.steps import Step
    from dynamo_mpi.discovery.etcd import EtcdClient

# a node agent may still be writing the report of its ranks
GRACE_SECONDS = 2.0
_LOOK_SECONDS = 0.05
_ETCD_SECONDS = 2.0
# reports of ranks and node agents, as text and as JSON
_REPORT = re.compile(
    r'dynamo_mpi: (?:rank \d+ on )?\S+: (?:error\b|preflight: \d+ errors?\b|exit: code \d)|"level":"ERROR","target":"dynamo_mpi"'
)


class Beginning(NamedTuple):
    """One start of a worker.

    Args:
        worker: the worker.
        origin: its identity in a failure record, from its command line.
        failures: its folder for failure files on this host; None if it isn't known.
        earlier: the files that existed before.
    """

    worker: Worker
    origin: WorkerIdentity
    failures: Path | None
    earlier: frozenset[tuple[str, int, int]]

    @classmethod
    def of(cls, worker: Worker, command: Command, environ: Mapping[str, str], failures: Path) -> Beginning:
        """Record a start.

        Args:
            worker: the worker.
            command: its command.
            environ: its whole environment.
            failures: the default folder for failure files.
        """
        words = command.words
        named = _values(words, "--failure-dir")
        if named and named[0].endswith(f"/failures/{worker.name}"):
            del named[0]  # the default, by its path inside the image
        # the user's choice; inside an image it may be any folder
        folder = Path(named[-1]) if named else failures
        origin = _origin(worker, words, environ)
        return cls(worker, origin, folder, _files(folder))

    @property
    def has_files(self) -> bool:
        """Whether a rank has written a failure file since then."""
        return any(True for _ in self._contents())

    def reports(self) -> tuple[RankReport, ...]:
        """Return what the ranks' failure files have, the earliest first."""
        reports = []
        for content in self._contents():
            with contextlib.suppress(KeyError, TypeError, ValueError):
                reports.append(RankReport.of(content))
        return tuple(sorted(reports, key=lambda report: report.time))

    def _contents(self) -> Iterator[dict[str, Any]]:
        """Yield the failure files of this start: ranks of the one before may be cut off, and write theirs only now."""
        for name, _, _ in _files(self.failures) - self.earlier if self.failures is not None else ():
            with contextlib.suppress(OSError, ValueError):
                content = json.loads(read_own(Path(self.failures or "") / name))
                if isinstance(content, dict) and content.get("attempt", self.origin.attempt) == self.origin.attempt:
                    yield content

    def lost_hosts(self) -> dict[str, str]:
        """Return the hosts that the report of the whole worker names as lost, and why."""
        lost = [each for each in self.reports() if each.is_composed and each.cause is DetectedBy.HOST_UNREACHABLE]
        return {each.host: f"rank {each.rank}'s host doesn't answer the other ranks" for each in lost}

    def written(self) -> str:
        """Return the root cause from the ranks' failure files, for use if it isn't in their output: Open MPI 5's mpirun may drop output
        after a rank has exited with an error. Empty if there is none."""
        composed = (f"rank {each.rank} on {each.host}: {each.text}" for each in self.reports() if each.is_composed)
        return next(composed, "")


class Trace(NamedTuple):
    """A start's records in etcd.

    Args:
        origin: the worker's identity; None if it has no record.
        record: the lease of its record; 0 for none.
        phase: the record's phase.
        is_reported: whether a failure record exists.
        answered: whether etcd answered and accepted our credentials.
    """

    origin: WorkerIdentity | None = None
    record: int = 0
    phase: str = ""
    is_reported: bool = False
    answered: bool = True


class Report(NamedTuple):
    """The launcher's report, in place of the ranks'.

    Args:
        found: the problem.
        expected: what is expected.
        fix: the fix.
    """

    found: str
    expected: str
    fix: str

    def __str__(self) -> str:
        return f"{self.found}\n  expected: {self.expected}\n  fix:      {self.fix}"


def is_reported(code: int, words: str) -> bool:
    """Return whether a worker's own processes have reported why it ended. Pure.

    Args:
        code: its launcher's exit code.
        words: the step's output.
    """
    return code in MISTAKES or _REPORT.search(words) is not None


def trace_in_etcd(beginning: Beginning, environ: Mapping[str, str]) -> Trace:
    """Read a start's records in etcd, before they are deleted. Takes at most two seconds; does not raise."""
    try:
        return query_etcd(environ, _ETCD_SECONDS, lambda etcd: _trace(beginning.origin, etcd))
    except DynamoMpiError:
        return Trace(answered=False)


_NONE: Mapping[str, str] = MappingProxyType({})


def report_death(
    beginning: Beginning,
    step: Step,
    code: int,
    trace: Trace,
    environ: Mapping[str, str],
    lost: Mapping[str, str] = _NONE,
) -> Report | None:
    """Report the failure of a worker if none of its own processes has: return the report, and write it to etcd and to a failure file.

    Args:
        beginning: the start.
        step: the step, which has ended.
        code: the worker's exit code.
        trace: its records in etcd at its end.
        environ: has etcd's endpoints and our credentials.
        lost: nodes of the worker that are known to be lost, and why.

    Returns:
        The report; None if the ranks, or their node agents, have reported the failure.
    """
    end = time.monotonic() + (0.0 if lost else GRACE_SECONDS)
    while not (is_heard := trace.is_reported or beginning.has_files) and time.monotonic() < end:
        time.sleep(_LOOK_SECONDS)
    if is_heard:
        return None
    worker = beginning.worker
    words = step.child.output()
    death = first_death(words)
    if death is not None:
        death = death.placed(worker.nodes, worker.ranks_per_node)
    report = _lost(worker.name, code, lost) if lost else _report(worker.name, code, death, step)
    failure = Failure(
        death.ranks[0] if death is not None and len(death.ranks) == 1 else -1,
        # a launcher may exit with 0 after the loss of a host, but 0 is no failure's code
        code or ExitCode.TEMPORARY,
        report.found,
        DetectedBy.HOST_UNREACHABLE if lost else DetectedBy.DISCONNECT,
        trace.phase,
        time.monotonic(),
    )
    host = next(iter(lost), death.host if death is not None else "")
    origin = trace.origin or beginning.origin
    content = failure_record(origin, failure, host, str(report))
    # the report is printed and written to a file even if etcd can't be reached
    with contextlib.suppress(DynamoMpiError):
        if trace.answered and not query_etcd(
            environ,
            _ETCD_SECONDS,
            lambda etcd: not _is_left(origin, etcd) and create_if_absent(etcd, content, trace.record),
        ):
            return None
    if beginning.failures is not None:
        rendezvous = Rendezvous(os.uname().nodename, failure_dir=str(beginning.failures), label=origin.component)
        more = {"report": str(report), "consequences": [], "attempt": origin.attempt}
        write_failure(rendezvous, failure, host, by=0, report=more)
    return report


def _lost(name: str, code: int, lost: Mapping[str, str]) -> Report:
    listed = ", ".join(f"{node} is lost ({why})" for node, why in lost.items())
    found = f"{name} ended with exit code {code}: {listed}, and no rank was left to report it"
    return Report(
        found, "nodes that run until the job ends", f"look at {', '.join(lost)}: power, network, its kernel's log"
    )


def _report(name: str, code: int, death: Death | None, step: Step) -> Report:
    number = -step.child.popen.returncode
    if death is None and number > 0:
        who = f"its launcher was killed by {spell_signal(number)}"
        found = f"{name} ended with exit code {code}: {who}, and its ranks left no report"
        return Report(
            found, "a launcher that runs as long as its ranks", "find out what killed it: the kernel, or an operator"
        )
    if death is None:
        found = f"{name} ended with exit code {code}, its ranks left no report, and its launcher does not report how they ended"
        return Report(found, "ranks that serve until they are asked to end", f"read the end of {step.child.log}")
    found = f"{name} ended with exit code {code}: {death}, and no rank was left to report it"
    where = f" on {death.host}" if death.host else ""
    if death.signal == signal.SIGKILL:
        fix = f"find out what killed it: the kernel's log{where} (memory that ran out), Slurm, or an operator"
    elif death.signal:
        fix = f"read its earlier output in {step.child.log}; the kernel's log{where} and a core file have more details"
    else:
        fix = f"read the earlier output in {step.child.log}" + (f", and check {death.host}" if death.host else "")
        if death.code == 1 and any(word.startswith("--container-image=") for word in step.command.words):
            # srun closes its connections when it ends a step after a task's failure (seen in 2 of 45 starts on a busy machine, Slurm 22.05)
            fix += "; if its container could not be started, slurmd's log there has Pyxis's lines: srun may drop them"
    return Report(found, "ranks that run until they are all asked to end", fix)


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
    """Return the worker's identity if it has no record: the one that its ranks would derive from their flags and variables."""

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
    """Return the failure files in a folder, with values that change if one is rewritten."""
    found = []
    try:
        for entry in os.scandir(folder):
            if entry.name.endswith(".json") and not entry.name.startswith("."):
                status = entry.stat(follow_symlinks=False)
                # another user may write there, too
                if status.st_uid == os.geteuid():
                    found.append((entry.name, status.st_ino, status.st_mtime_ns))
    except OSError:  # not created yet, or on another host
        pass
    return frozenset(found)


REVOKE_SECONDS = 2.0


def revoke_registrations(launch: str, environ: Mapping[str, str]) -> bool:
    """Revoke the leases of a worker that no longer runs. Takes at most `REVOKE_SECONDS`.

    Args:
        launch: the launch name that its ranks got.
        environ: has etcd's endpoints and credentials, as for the worker.

    Returns:
        Whether it was still registered.

    Raises:
        DiscoveryError: no endpoint has answered in time.
        AuthorizationError: they reject our credentials.
        UsageError: the settings for etcd can't be used.
    """
    return query_etcd(environ, REVOKE_SECONDS, lambda etcd: _clear(launch, etcd))


def _clear(launch: str, etcd: EtcdClient) -> bool:
    registered = False
    for worker in list_workers(etcd)[0]:
        if worker.record.launch != launch:
            continue
        with contextlib.suppress(ValueError):  # its instance is not a number
            instance = int(worker.record.instance or "0", 16)
            # the instance first, so that it gets no more requests
            registered |= 0 < instance < 2**63 and etcd.revoke(instance)
            if worker.lease:
                etcd.revoke(worker.lease)
    return registered
