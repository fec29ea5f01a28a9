# SPDX-License-Identifier: Apache-2.0
"""Deregisters a worker if its rank 0 is dead, hung or on a lost node, and records the cause in etcd.

Dynamo's runtime runs in rank 0 or its child. Without revocation, its lease and the worker record's would keep a dead worker registered for
half a minute.
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

_ETCD_SECONDS = 1.0


class LeaseRevoker:
    """Revokes leases through etcd's JSON gateway, which needs no package, or through the gRPC client if etcd has no gateway.

    No method raises. Thread-safe: requests to etcd run one after the other.
    """

    def __init__(self) -> None:
        self._leases: list[int] = []
        # the worker that owns the leases, and the lease of its record
        self._worker: dict[str, Any] = {}
        self._record = 0
        self._environ: dict[str, str] = {}
        self._lock = threading.Lock()

    @property
    def has_leases(self) -> bool:
        """Whether there are leases to revoke."""
        return bool(self._leases)

    def set_leases(self, encoded: str) -> None:
        """Set the leases, and import what revoking needs, so that `revoke` is quick.

        Args:
            encoded: the result of `encode_leases`.
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
        """Drop the leases: rank 0 shut down in order."""
        self._leases, self._record = [], 0

    def revoke(self) -> None:
        """Revoke the leases, in at most 1 s, or 2 s if etcd has no gateway. Idempotent."""
        with self._lock:
            leases, self._leases = self._leases, []
            if not leases:
                return
            # a lease that can't be revoked expires by itself
            with contextlib.suppress(Exception):
                from dynamo_mpi.discovery.etcd_http import query_etcd

                query_etcd(
                    self._environment,
                    _ETCD_SECONDS,
                    lambda etcd: [etcd.revoke(lease) for lease in leases],
                    or_grpc=True,
                )

    def record_failure(self, failure: Failure, host: str, report: str) -> bool:
        """Record in etcd why the worker ended, unless another process has done so. Takes at most 2 s.

        Args:
            failure: the root cause.
            host: the host where it happened.
            report: the logged report.

        Returns:
            Whether another process had recorded a failure before.
        """
        with self._lock:
            record, self._record = self._record, 0
            if not record or not self._worker:
                return False
            # rank 0 may have another version, and a client may not suit the installed protobuf: any error is possible
            with contextlib.suppress(Exception):
                from dynamo_mpi.common.record_codec import read_fields
                from dynamo_mpi.discovery.etcd_http import query_etcd
                from dynamo_mpi.discovery.failure_records import WorkerIdentity, create_if_absent, failure_record

                content = failure_record(read_fields(WorkerIdentity, self._worker), failure, host, report)
                return not query_etcd(
                    self._environment, _ETCD_SECONDS, lambda etcd: create_if_absent(etcd, content, record), or_grpc=True
                )
        return False

    @property
    def _environment(self) -> dict[str, str]:
        return {**os.environ, **self._environ}


def encode_leases(
    leases: Mapping[str, int], environ: Mapping[str, str], worker: Mapping[str, Any] | None = None, record: int = 0
) -> str:
    """Encode the input of `LeaseRevoker.set_leases` as one line.

    Args:
        leases: lease ids by purpose.
        environ: variables about etcd that rank 0 determined and the agent's environment lacks.
        worker: the fields of the `failure_records.WorkerIdentity` that owns the leases; no secrets.
        record: the lease of the worker's record; 0 if there is none.
    """
    content = {
        "leases": list(leases.values()),
        "environ": dict(environ),
        "worker": dict(worker or {}),
        "record": record,
    }
    return json.dumps(content)
