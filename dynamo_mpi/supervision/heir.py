# SPDX-License-Identifier: Apache-2.0
"""Takes a worker out of discovery when its rank 0 can't: it has been killed, is stuck, or its node is lost.

Dynamo's runtime lives in rank 0 or in its child; its lease, and our record's, would keep the worker registered for half a minute after it.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from typing import TYPE_CHECKING, Any

from dynamo_mpi.errors import BootstrapError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from dynamo_mpi.control_plane.etcd import Etcd

_SECONDS = 1.0


class Heir:
    """Knows the leases, and is connected to etcd, from the moment that there is something to take away. Nothing here raises."""

    def __init__(self) -> None:
        self._leases: list[int] = []
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
        except (ValueError, KeyError, TypeError, AttributeError):
            return
        self._connected()

    def renounce(self) -> None:
        """Forget it: rank 0 has left in order."""
        self._leases = []

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


def will_of(leases: Mapping[str, int], environ: Mapping[str, str]) -> str:
    """Return what an heir has to know, as one line.

    Args:
        leases: what for, and their ids.
        environ: what rank 0 has found out or been told of etcd, beyond what the heir's own environment says.
    """
    return json.dumps({"leases": list(leases.values()), "environ": dict(environ)})


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
