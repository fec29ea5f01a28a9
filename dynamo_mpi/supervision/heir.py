# SPDX-License-Identifier: Apache-2.0
"""Takes a worker out of discovery when its rank 0 can't: it has been killed, is stuck, or its node is lost. Leaves word of why, too.

Dynamo's runtime lives in rank 0 or in its child; its lease, and our record's, would keep the worker registered for half a minute after it.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from typing import TYPE_CHECKING, Any

from dynamo_mpi.errors import BootstrapError
from dynamo_mpi.supervision.failure import Cause, Failure

if TYPE_CHECKING:
    from collections.abc import Mapping

    from dynamo_mpi.control_plane.etcd import Etcd

MOURN = "mourn"
_SECONDS = 1.0


class Heir:
    """Knows the leases, and is connected to etcd, from the moment that there is something to take away. Nothing here raises."""

    def __init__(self) -> None:
        self._leases: list[int] = []
        # whose it is, and its record's lease
        self._worker: dict[str, Any] = {}
        self._record = 0
        self._environ: dict[str, str] = {}
        self._etcd: Etcd | None = None

    def inherit(self, will: str) -> None:
        """Take note of what is there to take away, and connect: when it is needed, it has to be quick.

        Args:
            will: what `will_of` has made.
        """
        try:
            content: Any = json.loads(will)
            self._leases = [int(lease) for lease in content["leases"]]
            self._environ = {str(name): str(value) for name, value in content["environ"].items()}
            self._worker, self._record = dict(content.get("worker") or {}), int(content.get("record") or 0)
        except (ValueError, KeyError, TypeError, AttributeError):
            return
        self._connected()

    def renounce(self) -> None:
        """Forget it: rank 0 has left in order."""
        self._leases, self._record = [], 0

    def act(self) -> None:
        """Revoke the leases, in a second at the most once there is a connection. More than once does no harm."""
        leases, self._leases = self._leases, []
        etcd = self._connected() if leases else None
        end = time.monotonic() + _SECONDS
        for lease in leases:
            # it is gone already, or goes with its time
            with contextlib.suppress(BootstrapError):
                if etcd is not None and (left := end - time.monotonic()) > 0:
                    etcd.revoke(lease, left)

    def leave_word(self, failure: Failure, host: str, report: str) -> None:
        """Leave in etcd why the worker ended, unless rank 0 or another heir has done so. Once: the first counts. Each of its two or three
        calls takes a second at the most.

        Args:
            failure: the first cause.
            host: where it happened.
            report: what has been said of it.
        """
        record, self._record = self._record, 0
        etcd = self._connected() if record and self._worker else None
        # a client that doesn't suit its protobuf, and a rank 0 of another version, raise errors of their own
        with contextlib.suppress(Exception):
            if etcd is not None:
                from dynamo_mpi.control_plane.last_failure import Origin, last_failure
                from dynamo_mpi.control_plane.obituary import leave_word
                from dynamo_mpi.control_plane.plain_data import read_fields

                origin = read_fields(Origin, self._worker)
                leave_word(etcd, origin, record, last_failure(origin, failure, host, report))

    def close(self) -> None:
        """Close the connection."""
        if self._etcd is not None:
            self._etcd.close()

    def _connected(self) -> Etcd | None:
        if self._etcd is None:
            # whatever a client of etcd that isn't installed, or doesn't suit its protobuf, raises
            with contextlib.suppress(Exception):
                self._etcd = _connect({**os.environ, **self._environ})
        return self._etcd


def will_of(
    leases: Mapping[str, int], environ: Mapping[str, str], worker: Mapping[str, Any] | None = None, record: int = 0
) -> str:
    """Return what an heir has to know, as one line.

    Args:
        leases: what for, and their ids.
        environ: what rank 0 has found out or been told of etcd, beyond what the heir's own environment says.
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


def mourning(failure: Failure, host: str) -> str:
    """Return the line by which a rank has its companion act for a rank 0 on another node.

    Args:
        failure: what has become of rank 0.
        host: its node.
    """
    return f"{MOURN} {json.dumps([failure.exit_code, failure.text, int(failure.cause), failure.phase, host])}"


def mourned(text: str) -> tuple[Failure, str] | None:
    """Read what follows the first word of such a line; None where it can't be read."""
    try:
        code, error, cause, phase, host = json.loads(text)
        return Failure(0, int(code), str(error), Cause(cause), str(phase), time.monotonic()), str(host)
    except (ValueError, TypeError):
        return None


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
