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

from dynamo_mpi.errors import DiscoveryError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from dynamo_mpi.control_plane.etcd import Etcd
    from dynamo_mpi.control_plane.etcd_gateway import EtcdGateway
    from dynamo_mpi.supervision.failure import Failure

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
        import dynamo_mpi.control_plane.ask_etcd  # noqa: F401

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
                from dynamo_mpi.control_plane.ask_etcd import ask_etcd

                try:
                    ask_etcd(self._environment, _SECONDS, lambda etcd: [etcd.revoke(lease) for lease in leases])
                except DiscoveryError:
                    with contextlib.closing(_client(self._environment)) as client:
                        for lease in leases:
                            client.revoke(lease, _SECONDS)

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
                from dynamo_mpi.control_plane.ask_etcd import ask_etcd
                from dynamo_mpi.control_plane.last_failure import Origin, failure_key, last_failure
                from dynamo_mpi.control_plane.obituary import LIFE_SECONDS, leave_word
                from dynamo_mpi.control_plane.plain_data import read_fields

                origin = read_fields(Origin, self._worker)
                content = last_failure(origin, failure, host, report)

                def write(etcd: EtcdGateway) -> bool:
                    lease = etcd.grant(LIFE_SECONDS)
                    if etcd.create(failure_key(origin, record), content.pack(), lease):
                        return True
                    etcd.revoke(lease)
                    return False

                try:
                    return not ask_etcd(self._environment, _SECONDS, write)
                except DiscoveryError:
                    with contextlib.closing(_client(self._environment)) as client:
                        return not leave_word(client, origin, record, content)
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


def _client(environ: Mapping[str, str]) -> Etcd:
    """Return a client of etcd's.

    Raises:
        BootstrapError: what is set for etcd can't be used.
        ImportError: the client isn't installed.
    """
    from dynamo_mpi.control_plane.etcd import Etcd
    from dynamo_mpi.control_plane.etcd_auth import EtcdAuth
    from dynamo_mpi.control_plane.probe import etcd_endpoints

    return Etcd(etcd_endpoints(environ), EtcdAuth.of(environ), _SECONDS)
