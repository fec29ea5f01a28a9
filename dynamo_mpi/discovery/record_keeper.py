# SPDX-License-Identifier: Apache-2.0
"""Keeps a world's record in etcd for as long as rank 0 lives, and watches its peers' records meanwhile."""

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

_FAREWELL_SECONDS = 1.0
# a record stays small, however often a partner is started anew
# requests come and go by the thousand
_BETWEEN_UPDATES_SECONDS = 1.0


class RecordKeeper:
    """Keeps one record.

    A thread of its own renews the lease three times in its life, and writes the record anew: at once when the phase changes, once a second
    at the most when something else does, and when etcd was away for so long, or came back so empty, that it has forgotten us. Whatever etcd
    does, the worker goes on: that is for the lease of Dynamo's runtime to decide.

    Args:
        etcd: where; closed at the end.
        record: what to keep.
        seconds: that the record outlives a rank 0 which was killed.
        log: the worker's log.
        on_lease: called with the id of each lease that the record gets.
        on_peers: called, from the keeper's thread, with the peers and with what is told of them when they change.
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
        # a signal's handler may put into it, whatever the main thread was doing
        self._changes: queue.SimpleQueue[Callable[[WorkerRecord], WorkerRecord] | None] = queue.SimpleQueue()
        # the latest of each; the queue holds one word of them, however many there were
        self._updates: dict[str, Any] = {}
        self._is_announced = False
        self._written_at = 0.0
        self._thread: threading.Thread | None = None

    def publish(self) -> list[StoredRecord]:
        """Write the record, then read the others.

        Returns:
            The peers that came before us: of two that do this at the same moment, exactly one sees the other here.

        Raises:
            DiscoveryError: etcd does not answer, or forgets at once what it is told.
            AuthorizationError: it refuses us.
        """
        own = self._write()
        worlds = self._read()
        came = next((world.create_revision for world in worlds if world.key == own), None)
        if came is None:
            raise DiscoveryError(
                "etcd has lost this world's record as soon as it was written",
                needed="an etcd that keeps a lease for as long as it says",
                fix="look at etcd's log, and at ETCD_LEASE_TTL",
            )
        self._peers = peers_of(self._record, worlds)
        return [peer for peer in self._peers if peer.create_revision < came]

    def start(self) -> None:
        """Begin to keep what was published."""
        thread = threading.Thread(target=self._run, name="record", daemon=True)
        # seen by `unpublish`, in another thread or a signal's handler, only once it can be joined
        thread.start()
        self._thread = thread

    def set_phase(self, phase: str) -> None:
        """Have the record say so at once. Never waits."""
        self._updates.pop("progress", None)
        self._changes.put(partial(replace, phase=phase, phase_since=time.time(), progress=None))

    def set_instance(self, instance: str) -> None:
        """Have the record name Dynamo's instance at once. Never waits."""
        self._changes.put(partial(replace, instance=instance))

    def update(self, **fields: Any) -> None:
        """Have the record say something else that changes often, within about a second: many changes until then cost one write. Never
        waits, and may be called from a signal's handler.

        Args:
            fields: of `WorkerRecord`.
        """
        self._updates.update(fields)
        # looked at after the update is there, and taken back before it is fetched: none gets lost
        if not self._is_announced:
            self._is_announced = True
            self._changes.put(_unchanged)

    def unpublish(self) -> None:
        """Take the record away: at once, or with its lease where etcd doesn't answer within a second. From any thread, or a signal's
        handler; more than once does no harm."""
        self._changes.put(None)
        thread = self._thread
        if thread is None:
            # also here in a thread: a handler may have interrupted whoever holds the connection's lock
            thread = threading.Thread(target=self._retract, name="record", daemon=True)
            thread.start()
            self._thread = thread
        if thread is not threading.current_thread():
            thread.join(_FAREWELL_SECONDS)

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
            # another thread, or a handler, may have taken the last one
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
                self._log.warning(f"the world record in etcd can't be kept for now, the worker goes on: {error.found}")
            return
        if self._away:
            self._away = False
            self._log.info("the world record is in etcd again")

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
            self._log.warning(f"the record {key!a} in etcd can't be read, and is left out: {unread[key]}")
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
        with contextlib.suppress(DynamoMpiError):  # it goes with its lease, then
            if self._lease is not None:
                self._etcd.revoke(self._lease.id, _FAREWELL_SECONDS)
        self._etcd.close()


def _unchanged(record: WorkerRecord) -> WorkerRecord:
    return record
