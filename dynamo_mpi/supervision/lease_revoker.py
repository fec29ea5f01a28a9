# SPDX-License-Identifier: Apache-2.0
"""Takes a worker out of discovery if its rank 0 can't: that was killed, is stuck, or its node is lost. Records the cause, too.

Dynamo's runtime lives in rank 0 or in its child; its lease, and our record's, would keep the worker registered for half a minute after it.
"""

from __future__ import annotations

import contextlib
import json
import os
import threading
import time
from typing import TYPE_CHECKING, Any

from dynamo_mpi.errors import BootstrapError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from dynamo_mpi.control_plane.etcd import Etcd
    from dynamo_mpi.supervision.failure import Failure

_SECONDS = 1.0


class LeaseRevoker:
    """Knows the leases, and is connected to etcd, from the moment that there is something to revoke. Nothing here raises.

    Thread-safe: what waits for etcd does so one after the other.
    """

    def __init__(self) -> None:
        self._leases: list[int] = []
        # whose they are, and the record's lease
        self._worker: dict[str, Any] = {}
        self._record = 0
        self._environ: dict[str, str] = {}
        self._etcd: Etcd | None = None
        self._lock = threading.Lock()

    @property
    def has_leases(self) -> bool:
        """Whether there is something to revoke."""
        return bool(self._leases)

    def set_leases(self, encoded: str) -> None:
        """Take note of what there is to revoke, and connect: when it is needed, it must be quick.

        Args:
            encoded: what `encode_leases` has made.
        """
        try:
            content: Any = json.loads(encoded)
            leases = [int(lease) for lease in content["leases"]]
            environ = {str(name): str(value) for name, value in content["environ"].items()}
            worker, record = dict(content.get("worker") or {}), int(content.get("record") or 0)
        except (ValueError, KeyError, TypeError, AttributeError):
            return
        with self._lock:
            self._leases, self._environ, self._worker, self._record = leases, environ, worker, record
            self._connected()

    def clear(self) -> None:
        """Forget them: rank 0 has left in order."""
        self._leases, self._record = [], 0

    def revoke(self) -> None:
        """Revoke the leases, in a second at the most once there is a connection. More than once does no harm."""
        with self._lock:
            leases, self._leases = self._leases, []
            etcd = self._connected() if leases else None
            end = time.monotonic() + _SECONDS
            for lease in leases:
                # it is gone already, or goes with its time
                with contextlib.suppress(BootstrapError):
                    if etcd is not None and (left := end - time.monotonic()) > 0:
                        etcd.revoke(lease, left)

    def record_failure(self, failure: Failure, host: str, report: str) -> bool:
        """Record in etcd why the worker ended, unless another process has done so: the first counts. Each of its two or three
        calls takes a second at the most.

        Args:
            failure: the first cause.
            host: where it happened.
            report: what has been logged of it.

        Returns:
            Whether another process had done so before.
        """
        with self._lock:
            record, self._record = self._record, 0
            etcd = self._connected() if record and self._worker else None
            # a client that doesn't suit its protobuf, and a rank 0 of another version, raise errors of their own
            with contextlib.suppress(Exception):
                if etcd is not None:
                    from dynamo_mpi.control_plane.last_failure import Origin, last_failure
                    from dynamo_mpi.control_plane.obituary import leave_word
                    from dynamo_mpi.control_plane.plain_data import read_fields

                    origin = read_fields(Origin, self._worker)
                    return not leave_word(etcd, origin, record, last_failure(origin, failure, host, report))
        return False

    def close(self) -> None:
        """Close the connection."""
        with self._lock:
            if self._etcd is not None:
                self._etcd.close()

    def _connected(self) -> Etcd | None:
        if self._etcd is None:
            # whatever a client of etcd that isn't installed, or doesn't suit its protobuf, raises
            with contextlib.suppress(Exception):
                self._etcd = _connect({**os.environ, **self._environ})
        return self._etcd


def encode_leases(
    leases: Mapping[str, int], environ: Mapping[str, str], worker: Mapping[str, Any] | None = None, record: int = 0
) -> str:
    """Return what a lease revoker has to know, as one line.

    Args:
        leases: what for, and their ids.
        environ: what rank 0 has found out about etcd, beyond what the agent's own environment says.
        worker: whose leases they are, as `last_failure.Origin` has it; no secret.
        record: the lease of the worker's record; 0 where there is none.
    """
    content = {
        "leases": list(leases.values()),
        "environ": dict(environ),
        "worker": dict(worker or {}),
        "record": record,
    }
    return json.dumps(content)


def _connect(environ: Mapping[str, str]) -> Etcd:
    """Connect.

    Raises:
        BootstrapError: what is set for etcd can't be used, or it does not answer.
        ImportError: its client isn't installed.
    """
    from dynamo_mpi.control_plane.etcd import Etcd
    from dynamo_mpi.control_plane.etcd_auth import EtcdAuth
    from dynamo_mpi.control_plane.probe import etcd_endpoints

    etcd = Etcd(etcd_endpoints(environ), EtcdAuth.of(environ), _SECONDS)
    etcd.entries("v1/instances/")
    return etcd
