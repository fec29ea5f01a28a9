# SPDX-License-Identifier: Apache-2.0
"""Keeps a worker's record in etcd while rank 0 runs, and watches its peers' records."""

from __future__ import annotations

import contextlib
import queue
import threading
import time
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from dynamo_mpi.common.errors import DiscoveryError, DynamoMpiError
from dynamo_mpi.discovery.etcd import LeaseLostError
from dynamo_mpi.discovery.peer_compat import describe_changes, peers_of
from dynamo_mpi.discovery.records import list_workers, record_key

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from dynamo_mpi.common.log import RankLogger
    from dynamo_mpi.discovery.etcd import Lease
    from dynamo_mpi.discovery.etcd_grpc import GrpcEtcdClient
    from dynamo_mpi.discovery.records import StoredRecord, WorkerRecord

_CLOSE_SECONDS = 1.0
# the record must stay small, however often a partner restarts
# there may be thousands of requests per second
_BETWEEN_UPDATES_SECONDS = 1.0


class RecordKeeper:
    """Keeps one record.

    A thread renews the lease three times in its lifetime, and rewrites the record: at once when the phase changes, at most once per second
    when something else changes, and when etcd has lost the record. If etcd fails, the worker goes on: only the lease of Dynamo's runtime
    decides about that.

    Args:
        etcd: the client; closed at the end.
        record: the record.
        seconds: after rank 0 is killed, the record expires after this time.
        log: the worker's log.
        on_lease: called with the id of each lease that the record gets.
        on_peers: called, in the keeper's thread, with the peers and a line for each change, when they change.
    """

    def __init__(
        self,
        etcd: GrpcEtcdClient,
        record: WorkerRecord,
        seconds: int,
        log: RankLogger,
        on_lease: Callable[[int], object] = lambda _: None,
        on_peers: Callable[[Sequence[StoredRecord], Sequence[str]], object] = lambda _, __: None,
    ) -> None:
        self._etcd, self._record, self._seconds, self._log = etcd, record, seconds, log
        self._on_lease, self._on_peers = on_lease, on_peers
        self._lease: Lease | None = None
        self._stale = self._away = False
        self._peers: Sequence[StoredRecord] = ()
        self._odd: set[str] = set()
        # a signal handler may put into it at any time
        self._changes: queue.SimpleQueue[Callable[[WorkerRecord], WorkerRecord] | None] = queue.SimpleQueue()
        # the latest value of each field; the queue holds one entry for them, however many changes there were
        self._updates: dict[str, Any] = {}
        self._is_announced = False
        self._written_at = 0.0
        self._thread: threading.Thread | None = None

    def publish(self) -> list[StoredRecord]:
        """Write the record, then read the others.

        Returns:
            The peers that started earlier: if two workers publish at the same moment, exactly one of them gets the other here.

        Raises:
            DiscoveryError: etcd does not answer, or loses the record at once.
            AuthorizationError: it rejects our credentials.
        """
        own = self._write()
        worlds = self._read()
        came = next((world.create_revision for world in worlds if world.key == own), None)
        if came is None:
            raise DiscoveryError(
                "etcd lost this worker's record immediately after it was written",
                expected="an etcd that keeps leases for their whole time",
                fix="check etcd's log, and ETCD_LEASE_TTL",
            )
        self._peers = peers_of(self._record, worlds)
        return [peer for peer in self._peers if peer.create_revision < came]

    def start(self) -> None:
        """Start to keep the published record."""
        thread = threading.Thread(target=self._run, name="record", daemon=True)
        # set only when the thread can be joined: `unpublish` may run in another thread or a signal handler
        thread.start()
        self._thread = thread

    def set_phase(self, phase: str) -> None:
        """Set the record's phase at once. Never waits."""
        self._updates.pop("progress", None)
        self._changes.put(partial(replace, phase=phase, phase_since=time.time(), progress=None))

    def set_instance(self, instance: str) -> None:
        """Set Dynamo's instance in the record at once. Never waits."""
        self._changes.put(partial(replace, instance=instance))

    def update(self, **fields: Any) -> None:
        """Set fields that change often, within about a second: all changes until then take one write. Never
        waits, and may be called from a signal handler.

        Args:
            fields: of `WorkerRecord`.
        """
        self._updates.update(fields)
        # set after the update is stored, and cleared before updates are fetched, so that none is lost
        if not self._is_announced:
            self._is_announced = True
            self._changes.put(_unchanged)

    def unpublish(self) -> None:
        """Delete the record: at once, or, if etcd doesn't answer within a second, when its lease expires. Can be called from any thread
        or a signal handler. Idempotent."""
        self._changes.put(None)
        thread = self._thread
        if thread is None:
            # in a thread here too: a signal handler may have interrupted the thread that holds the connection's lock
            thread = threading.Thread(target=self._retract, name="record", daemon=True)
            thread.start()
            self._thread = thread
        if thread is not threading.current_thread():
            thread.join(_CLOSE_SECONDS)

    def _run(self) -> None:
        renew_at = time.monotonic() + self._pause()
        while True:
            write_at = self._written_at + _BETWEEN_UPDATES_SECONDS
            wake_at = min(renew_at, write_at) if self._stale and not self._away else renew_at
            change: Callable[[WorkerRecord], WorkerRecord] | None = _unchanged
            with contextlib.suppress(queue.Empty):
                change = self._changes.get(timeout=max(0.0, wake_at - time.monotonic()))
            if change is None:
                break
            before, self._record = self._record, change(self._record)
            is_urgent = self._record != before
            self._fetch_updates()
            self._stale |= self._record != before
            now = time.monotonic()
            if is_urgent or now >= renew_at:
                self._renew()
                renew_at = time.monotonic() + self._pause()
            elif self._stale and not self._away and now >= write_at:
                self._attempt(self._rewrite)
        self._retract()

    def _fetch_updates(self) -> None:
        self._is_announced = False
        fields = {}
        while self._updates:
            # another thread, or a signal handler, may have taken the last one
            with contextlib.suppress(KeyError):
                name, value = self._updates.popitem()
                fields[name] = value
        self._record = replace(self._record, **fields)

    def _pause(self) -> float:
        return (self._lease.seconds if self._lease is not None else self._seconds) / 3

    def _renew(self) -> None:
        self._attempt(self._keep, self._look)

    def _attempt(self, *acts: Callable[[], object]) -> None:
        try:
            for act in acts:
                act()
        except DynamoMpiError as error:
            if not self._away:
                self._away = True
                self._log.warning(
                    f"the worker record in etcd can't be kept for now, the worker goes on: {error.problem}"
                )
            return
        if self._away:
            self._away = False
            self._log.info("the worker record is in etcd again")

    def _keep(self) -> None:
        try:
            if self._lease is None:
                self._write()
                return
            self._etcd.keep_alive(self._lease.id)
            if self._stale:
                self._put(self._lease)
        except LeaseLostError:
            self._lease = None
            self._write()

    def _rewrite(self) -> None:
        try:
            if self._lease is not None:
                self._put(self._lease)
        except LeaseLostError:
            self._lease = None
            self._write()

    def _write(self) -> str:
        """Write the record under a lease of its own, and return its key."""
        self._lease, self._stale = self._etcd.grant(self._seconds), True
        self._on_lease(self._lease.id)
        return self._put(self._lease)

    def _put(self, lease: Lease) -> str:
        key = record_key(self._record, lease.id)
        self._written_at = time.monotonic()
        self._etcd.put(key, self._record.pack(), lease.id)
        self._stale = False
        return key

    def _read(self) -> list[StoredRecord]:
        worlds, unread = list_workers(self._etcd, self._record.namespace)
        for key in unread.keys() - self._odd:
            self._odd.add(key)
            self._log.warning(f"the record {key!a} in etcd can't be read, and is ignored: {unread[key]}")
        return worlds

    def _look(self) -> None:
        if self._record.contract is None:
            return
        peers = peers_of(self._record, self._read())
        lines = describe_changes(self._record, self._peers, peers)
        for line in lines:
            self._log.info(line)
        self._peers = peers
        if lines:
            self._on_peers(peers, lines)

    def _retract(self) -> None:
        with contextlib.suppress(DynamoMpiError):  # otherwise it expires with its lease
            if self._lease is not None:
                self._etcd.revoke(self._lease.id, _CLOSE_SECONDS)
        self._etcd.close()


def _unchanged(record: WorkerRecord) -> WorkerRecord:
    return record
