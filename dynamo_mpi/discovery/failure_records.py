# SPDX-License-Identifier: Apache-2.0
"""Failure records: why a worker ended, kept in etcd for an hour. Its worker record is deleted when it ends, and its logs may be on a lost
node."""

from __future__ import annotations

import contextlib
import threading
import time
from dataclasses import asdict, dataclass, fields, replace
from typing import TYPE_CHECKING, NamedTuple

from dynamo_mpi.common.display import sanitize_lines
from dynamo_mpi.common.failure import first_line
from dynamo_mpi.common.hooks import WorkerHook
from dynamo_mpi.common.record_codec import parse_object, read_fields, write_object
from dynamo_mpi.common.redact import process_redactor
from dynamo_mpi.discovery.etcd_grpc import GrpcEtcdClient
from dynamo_mpi.discovery.records import SCHEMA, read_stored

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from dynamo_mpi.common.failure import Failure
    from dynamo_mpi.common.hooks import WorldFailure
    from dynamo_mpi.discovery.etcd import EtcdClient
    from dynamo_mpi.discovery.records import StoredRecord, WorkerRecord

TTL_SECONDS = 3600
"""How long a failure record exists."""
_ROOT = "dynamo_mpi/v1/failures/"
_MAX_REPORT_BYTES = 8192
_MAX_ERROR_CHARACTERS, _MAX_DISPLAYED_ERROR = 400, 1024
_MARK = "…"
_SECONDS = 1.0


@dataclass(frozen=True)
class WorkerIdentity:
    """The fields of a worker's record that identify it and don't change.

    Args:
        role: as in `WorkerRecord`, and so on.
        component: Dynamo's.
        namespace: Dynamo's.
        endpoint: ``dyn://namespace.component.endpoint``.
        model: the name that clients ask for.
        launch: `dynamo-mpi launch`'s name for it.
        job: Slurm's job id.
        step: Slurm's step id.
        attempt: the number of this start of the worker.
    """

    role: str
    component: str
    namespace: str
    endpoint: str
    model: str
    launch: str | None
    job: str | None
    step: str | None
    attempt: int

    @classmethod
    def of(cls, record: WorkerRecord) -> WorkerIdentity:
        """Return the identity of a worker record's worker."""
        return cls(*(getattr(record, field.name) for field in fields(cls)))


@dataclass(frozen=True)
class FailureRecord(WorkerIdentity):
    """Why a worker ended.

    Args:
        role: as in `WorkerIdentity`, like the rest up to ``attempt``.
        rank: the one that failed first; -1 if it isn't known.
        host: that rank's node.
        phase: the phase in which that rank was.
        cause: how it was detected: ``report``, ``disconnect``, ``host_unreachable``, ``heartbeat`` or ``signal``.
        exit_code: of all ranks.
        error: the error, in a line.
        report: the logged report, cut at 8 KiB.
        time: when it was detected, in seconds since 1970.
    """

    rank: int
    host: str
    phase: str
    cause: str
    exit_code: int
    error: str
    report: str
    time: float

    def pack(self) -> bytes:
        """Encode as JSON."""
        return write_object(self, SCHEMA)

    @classmethod
    def unpack(cls, data: bytes, problems: list[str] | None = None) -> FailureRecord:
        """Decode what `pack` made, here or in another version.

        Args:
            data: JSON.
            problems: None to be strict, a list to be tolerant, as for `record_codec.read_fields`.

        Raises:
            ValueError: it isn't a failure record, or has an unknown schema.
        """
        content = parse_object(data, SCHEMA)
        report, error = content.get("report"), content.get("error")
        if problems is None:
            # the one text of several lines, which must be sanitized before it is displayed
            if not isinstance(report, str) or len(report.encode("utf-8", "replace")) > _MAX_REPORT_BYTES:
                raise ValueError("report is no text of at most 8 KiB")
            return read_fields(cls, content, report=report)
        texts = {}
        for name, text in (("error", error), ("report", report)):
            if text is not None and not isinstance(text, str):
                problems.append(f"{name} is not a text")
            texts[name] = sanitize_lines(text, _MAX_REPORT_BYTES) if isinstance(text, str) else ""
        texts["error"] = texts["error"].strip().partition("\n")[0][:_MAX_DISPLAYED_ERROR]
        needed = ("namespace", "component", "model", "role", "exit_code", "time")
        found = read_fields(cls, content, problems, needed, **texts)
        # a code that no process can exit with would wrap around, even to 0
        code = found.exit_code if 0 < found.exit_code < 256 else 1
        return replace(found, exit_code=code, attempt=max(1, found.attempt))


class StoredFailure(NamedTuple):
    """A failure record in etcd.

    Args:
        key: its key, with the same last part as the worker record's.
        lease: the failure record's own.
        record: the failure.
    """

    key: str
    lease: int
    record: FailureRecord

    def has_same_name(self, worker: StoredRecord) -> bool:
        """Return whether it is the failure of the same process as this worker record."""
        return worker.key.rpartition("/")[2] == self.key.rpartition("/")[2]

    def is_followed_by(self, worker: StoredRecord) -> bool:
        """Return whether ``worker`` is a newer start of the one that failed, or replaces it."""
        ours, theirs = self.record, worker.record
        names = ("namespace", "component", "role", "model", "launch")
        if any(getattr(ours, name) != getattr(theirs, name) for name in names) or self.has_same_name(worker):
            return False
        return theirs.started >= ours.time or (ours.launch is not None and theirs.attempt > ours.attempt)


class FailureRecordStore(WorkerHook):
    """Writes one worker's failure record, for its rank 0. Nothing here raises: a worker that can't write it still ends.

    Args:
        worker: its identity.
        environ: has etcd's endpoints and our credentials.
        record_lease: returns the lease of its worker record; 0 if there is none.
    """

    def __init__(self, worker: WorkerIdentity, environ: Mapping[str, str], record_lease: Callable[[], int]) -> None:
        self._worker, self._environ, self._record_lease = worker, environ, record_lease

    def on_failure(self, failure: WorldFailure) -> None:
        """Write the record, replacing one that a node agent may have written. Takes a second or two if etcd does not answer."""

        def put(etcd: EtcdClient) -> None:
            lease = etcd.grant(TTL_SECONDS).id
            # without a worker record, the key ends with the lease of the failure record
            key = failure_key(self._worker, self._record_lease() or lease)
            etcd.put(key, failure_record(self._worker, failure.first, failure.host, failure.report).pack(), lease)

        self._connect(put)

    def on_ready(self) -> None:
        """Delete, in a thread, the failure records of earlier starts of this worker, since it serves now."""
        threading.Thread(target=self._connect, args=(self._clear,), name="failure records", daemon=True).start()

    def _clear(self, etcd: EtcdClient) -> None:
        for stored in list_failures(etcd, self._worker.namespace, self._worker.component)[0]:
            if is_successor(self._worker, stored.record):
                etcd.revoke(stored.lease)

    def _connect(self, act: Callable[[EtcdClient], None]) -> None:
        # etcd's client may not be installed, and an incompatible protobuf raises errors of its own
        with (
            contextlib.suppress(Exception),
            contextlib.closing(GrpcEtcdClient.from_env(self._environ, _SECONDS)) as etcd,
        ):
            act(etcd)


def create_if_absent(etcd: EtcdClient, failure: FailureRecord, record_lease: int = 0) -> bool:
    """Write a failure record unless another process has; return whether it was written.

    Args:
        etcd: the client.
        failure: the record.
        record_lease: of its worker record; 0 if there is none.

    Raises:
        DynamoMpiError: etcd does not answer, or rejects our credentials.
    """
    lease = etcd.grant(TTL_SECONDS).id
    if etcd.create(failure_key(failure, record_lease or lease), failure.pack(), lease):
        return True
    etcd.revoke(lease)
    return False


def list_failures(
    etcd: EtcdClient, namespace: str = "", component: str = "", problems: dict[str, list[str]] | None = None
) -> tuple[list[StoredFailure], dict[str, str]]:
    """Read the failure records of a namespace, or of one component of it, or all of them; otherwise as `records.list_workers`."""
    entries = etcd.get_prefix(failures_of(namespace, component))
    found, unreadable = read_stored(entries, FailureRecord.unpack, _ROOT, problems)
    return [StoredFailure(entry.key, entry.lease, record) for entry, record in found], unreadable


def failure_record(worker: WorkerIdentity, failure: Failure, host: str, report: str) -> FailureRecord:
    """Return the record of a failure.

    Args:
        worker: its identity.
        failure: the first cause.
        host: its host.
        report: the logged report.
    """
    redact = process_redactor().redact
    line = first_line(redact(failure.text))
    return FailureRecord(
        **asdict(worker),
        rank=failure.rank,
        host=host,
        phase=failure.phase,
        cause=failure.cause.name.lower(),
        exit_code=failure.exit_code,
        error="".join(letter if letter.isprintable() else " " for letter in line)[:_MAX_ERROR_CHARACTERS],
        report=_clipped(redact(report)),
        time=time.time() - max(0.0, time.monotonic() - failure.at) if failure.at else time.time(),
    )


def failure_key(worker: WorkerIdentity, lease: int) -> str:
    """Return the key of a failure record: its last part is that of the worker record's key."""
    return f"{failures_of(worker.namespace, worker.component)}{lease:x}"


def failures_of(namespace: str = "", component: str = "") -> str:
    """Return the prefix of the failure records of a namespace, or of one component of it; of all of them without either."""
    return _ROOT + "".join(f"{name}/" for name in (namespace, component) if name)


def is_successor(worker: WorkerIdentity, failure: FailureRecord) -> bool:
    """Return whether a worker is a later start of the one that failed."""
    if (worker.component, worker.role) != (failure.component, failure.role):
        return False
    if worker.launch or failure.launch:
        return worker.launch == failure.launch
    return worker.job is not None and (worker.job, worker.step) == (failure.job, failure.step)


def _clipped(text: str) -> str:
    data = text.encode("utf-8", "replace")
    if len(data) <= _MAX_REPORT_BYTES:
        return data.decode()
    # its beginning has the root cause
    return data[: _MAX_REPORT_BYTES - len(_MARK.encode())].decode(errors="ignore") + _MARK
