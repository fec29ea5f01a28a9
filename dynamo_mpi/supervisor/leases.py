# SPDX-License-Identifier: Apache-2.0
"""The leases that a worker owns in etcd. Rank 0 sends them to its node agent, which revokes them if rank 0 is dead, hung or on a lost node,
and records the cause in etcd.

Dynamo's runtime runs in rank 0 or its child. Without revocation, its lease and the worker record's would keep a dead worker registered for
half a minute.
"""

from __future__ import annotations

import contextlib
import json
import os
import threading

from dynamo_mpi.common.credentials import clients_environ, load_services
from dynamo_mpi.common.errors import DynamoMpiError
from dynamo_mpi.common.hooks import WorkerHook
from dynamo_mpi.common.light_typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping

    from dynamo_mpi.common.failure import Failure
    from dynamo_mpi.supervisor.agent_client import NodeAgentClient


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
        # now: the file system of a container may go with a rank
        import dynamo_mpi.discovery.etcd_http
        import dynamo_mpi.discovery.failure_records  # noqa: F401

        # now: the file's system may fail with rank 0's node. Without it, what can't be revoked expires by itself
        with contextlib.suppress(DynamoMpiError):
            load_services()
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
        return {**clients_environ(), **self._environ}


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


class OwnedLeases(WorkerHook):
    """The leases of one worker. The node agent also sends them to another node's agent, in case rank 0's node is lost.

    Args:
        agent: rank 0's connection to the node agent.
    """

    def __init__(self, agent: NodeAgentClient) -> None:
        self._agent = agent
        self._leases: dict[str, int] = {}
        self._worker: dict[str, Any] = {}
        self._lock = threading.Lock()

    def set_worker(self, worker: Mapping[str, Any]) -> None:
        """Set the worker's identity, for the failure record; it must contain no secrets. Call it before `add`."""
        self._worker = dict(worker)

    @property
    def record(self) -> int:
        """The lease of the worker record; 0 if there is none."""
        return self._leases.get("record", 0)

    def on_registered(self, lease: int) -> None:
        """Add the lease of Dynamo's instance."""
        self.add("instance", lease)

    def add(self, name: str, lease: int) -> None:
        """Add a lease, or replace the one of the same name.

        Args:
            name: its purpose.
            lease: the lease id.
        """
        # the record's lease comes from one thread, the instance's from another
        with self._lock:
            self._leases[name] = lease
            self._agent.send(f"leases {self._encoded()}")

    def _encoded(self) -> str:
        endpoints = os.environ.get("ETCD_ENDPOINTS", "")
        # credentials are in each node's own environment, or in a file that each agent reads
        overrides = {"ETCD_ENDPOINTS": endpoints} if endpoints and "@" not in endpoints else {}
        return encode_leases(self._leases, overrides, self._worker, self.record)
