# SPDX-License-Identifier: Apache-2.0
"""Leaves in etcd what a worker died of, and takes that away once a later start of it serves."""

from __future__ import annotations

import contextlib
import threading
from typing import TYPE_CHECKING

from dynamo_mpi.control_plane.etcd import Etcd, LeaseLostError
from dynamo_mpi.control_plane.etcd_auth import EtcdAuth
from dynamo_mpi.control_plane.last_failure import LastFailure, failure_key, failures_of, is_successor, last_failure
from dynamo_mpi.control_plane.probe import etcd_endpoints
from dynamo_mpi.supervision.hooks import WorkerHook

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from dynamo_mpi.control_plane.last_failure import Origin
    from dynamo_mpi.supervision.hooks import WorldFailure

LIFE_SECONDS = 3600
"""How long it can be read."""
_SECONDS = 1.0


class Obituary(WorkerHook):
    """Rank 0's word, for one worker. Nothing here raises: a worker that can't leave word ends all the same.

    Args:
        origin: the worker.
        environ: where etcd and our credentials stand.
        record: returns the lease of its world record; 0 where there is none.
    """

    def __init__(self, origin: Origin, environ: Mapping[str, str], record: Callable[[], int]) -> None:
        self._origin, self._environ, self._record = origin, environ, record

    def on_failure(self, failure: WorldFailure) -> None:
        """Write it, over what a node agent may have written. Takes a second or two where etcd does not answer."""

        def write(etcd: Etcd) -> None:
            lease = etcd.grant(LIFE_SECONDS).id
            # without a record it has a name of its own
            key = failure_key(self._origin, self._record() or lease)
            etcd.put(key, last_failure(self._origin, failure.first, failure.host, failure.report).pack(), lease)

        self._visit(write)

    def on_ready(self) -> None:
        """Take away, from a thread of its own, what earlier starts of this worker have died of: now it serves."""
        threading.Thread(target=self._visit, args=(self._forget,), name="obituary", daemon=True).start()

    def _forget(self, etcd: Etcd) -> None:
        for entry in etcd.entries(failures_of(self._origin.namespace, self._origin.component)):
            # one that another start takes away just now is no reason to leave the next
            with contextlib.suppress(ValueError, LeaseLostError):
                if is_successor(self._origin, LastFailure.unpack(entry.value)):
                    etcd.revoke(entry.lease, _SECONDS)

    def _visit(self, act: Callable[[Etcd], None]) -> None:
        # etcd's client may not be installed, and one that doesn't suit its protobuf raises errors of its own
        with (
            contextlib.suppress(Exception),
            contextlib.closing(Etcd(etcd_endpoints(self._environ), EtcdAuth.of(self._environ), _SECONDS)) as etcd,
        ):
            act(etcd)


def leave_word(etcd: Etcd, origin: Origin, record: int, failure: LastFailure) -> bool:
    """Write a failure, as a node agent does: unless rank 0, or another agent, has done so. Return whether it was written.

    Args:
        etcd: where.
        origin: the worker.
        record: the lease of its world record.
        failure: what to write.

    Raises:
        BootstrapError: etcd does not answer, or refuses us.
    """
    lease = etcd.grant(LIFE_SECONDS).id
    if etcd.create(failure_key(origin, record), failure.pack(), lease):
        return True
    etcd.revoke(lease, _SECONDS)
    return False
