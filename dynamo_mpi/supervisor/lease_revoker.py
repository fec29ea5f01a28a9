# SPDX-License-Identifier: Apache-2.0
"""Takes a worker out of discovery if its rank 0 can't: that was killed, is stuck, or its node is lost. Records the cause, too.

Dynamo's runtime lives in rank 0 or in its child; its lease, and our record's, would keep the worker registered for half a minute after it.
"""

from __future__ import annotations

import contextlib
import json
import os
import threading
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping

    from dynamo_mpi.common.failure import Failure

_SECONDS = 1.0


class LeaseRevoker:
    """Knows the leases, and revokes them by etcd's JSON gateway, which takes no package; where there is none, by etcd's client.

    Nothing here raises. Thread-safe: what waits for etcd does so one after the other.
    """

    def __init__(self) -> None:
        self._leases: list[int] = []
        # whose they are, and the record's lease
        self._worker: dict[str, Any] = {}
        self._record = 0
        self._environ: dict[str, str] = {}
        self._lock = threading.Lock()

    @property
    def has_leases(self) -> bool:
        """Whether there is something to revoke."""
        return bool(self._leases)

    def set_leases(self, encoded: str) -> None:
        """Take note of what there is to revoke, and import what that takes: when it is needed, it must be quick.

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
        import dynamo_mpi.discovery.etcd_http  # noqa: F401

        with self._lock:
            self._leases, self._environ, self._worker, self._record = leases, environ, worker, record

    def clear(self) -> None:
        """Forget them: rank 0 has left in order."""
        self._leases, self._record = [], 0

    def revoke(self) -> None:
        """Revoke the leases, in a second at the most, or two where etcd has no gateway. More than once does no harm."""
        with self._lock:
            leases, self._leases = self._leases, []
            if not leases:
                return
            # one that is gone already, or can't be reached, goes with its time
            with contextlib.suppress(Exception):
                from dynamo_mpi.discovery.etcd_http import query_etcd

                query_etcd(
                    self._environment, _SECONDS, lambda etcd: [etcd.revoke(lease) for lease in leases], or_grpc=True
                )

    def record_failure(self, failure: Failure, host: str, report: str) -> bool:
        """Record in etcd why the worker ended, unless another process has done so: the first counts. In a second or two at the most.

        Args:
            failure: the first cause.
            host: where it happened.
            report: what has been logged of it.

        Returns:
            Whether another process had done so before.
        """
        with self._lock:
            record, self._record = self._record, 0
            if not record or not self._worker:
                return False
            # a rank 0 of another version, or a client that doesn't suit its protobuf, raises errors of its own
            with contextlib.suppress(Exception):
                from dynamo_mpi.common.record_codec import read_fields
                from dynamo_mpi.discovery.etcd_http import query_etcd
                from dynamo_mpi.discovery.failure_records import WorkerIdentity, create_if_absent, failure_record

                content = failure_record(read_fields(WorkerIdentity, self._worker), failure, host, report)
                return not query_etcd(
                    self._environment, _SECONDS, lambda etcd: create_if_absent(etcd, content, record), or_grpc=True
                )
        return False

    @property
    def _environment(self) -> dict[str, str]:
        return {**os.environ, **self._environ}


def encode_leases(
    leases: Mapping[str, int], environ: Mapping[str, str], worker: Mapping[str, Any] | None = None, record: int = 0
) -> str:
    """Return what a lease revoker has to know, as one line.

    Args:
        leases: what for, and their ids.
        environ: what rank 0 has found out about etcd, beyond what the agent's own environment says.
        worker: whose leases they are, as `failure_records.WorkerIdentity` has it; no secret.
        record: the lease of the worker's record; 0 where there is none.
    """
    content = {
        "leases": list(leases.values()),
        "environ": dict(environ),
        "worker": dict(worker or {}),
        "record": record,
    }
    return json.dumps(content)
