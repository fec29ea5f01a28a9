# SPDX-License-Identifier: Apache-2.0
"""Takes a failed worker out of discovery at once: Dynamo's own lease would keep it there for half a minute.

Dynamo writes all keys of a worker under one lease; its id is the instance's (``v1/instances/NAMESPACE/COMPONENT/ENDPOINT/ID``, hexadecimal).
Whoever may write these keys may revoke it; the runtime then finds its lease gone, and ends, which is what a worker that failed does anyway.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

from dynamo_mpi.control_plane.etcd import Etcd
from dynamo_mpi.control_plane.etcd_auth import EtcdAuth
from dynamo_mpi.control_plane.probe import etcd_endpoints
from dynamo_mpi.errors import BootstrapError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

_SECONDS = 1.0


class Departure:
    """The way out of discovery, for one worker.

    Args:
        endpoint: ``dyn://namespace.component.endpoint``.
        environ: where etcd and our credentials stand.
        on_lease: called with the lease's id, once it is known.
    """

    def __init__(
        self, endpoint: str, environ: Mapping[str, str], on_lease: Callable[[int], object] = lambda _: None
    ) -> None:
        self._prefix = "v1/instances/" + endpoint.removeprefix("dyn://").replace(".", "/")
        self._environ, self._on_lease = environ, on_lease
        self._etcd: Etcd | None = None
        self._lease = 0

    def prepare(self, instance: int) -> None:
        """Connect, and find the lease of an instance that is registered, so that `leave` takes no longer than it has to. Does not raise.

        Args:
            instance: its id, as Dynamo's runtime has it.
        """
        with contextlib.suppress(BootstrapError, ImportError):  # the keys go with the lease's time, then
            etcd = Etcd(etcd_endpoints(self._environ), EtcdAuth.of(self._environ), _SECONDS)
            entries = etcd.entries(f"{self._prefix}/{instance:x}")
            # an instance without a lease of its own is nothing that we know
            self._lease = next((entry.lease for entry in entries if entry.lease == instance), 0)
            self._etcd = etcd
            if self._lease:
                self._on_lease(self._lease)

    def leave(self) -> bool:
        """Revoke the lease, in a second at the most, and tell whether the worker is out of discovery. Does not raise."""
        if self._etcd is None or not self._lease:
            return False
        try:
            self._etcd.revoke(self._lease, _SECONDS)
        except BootstrapError:
            return False
        return True
