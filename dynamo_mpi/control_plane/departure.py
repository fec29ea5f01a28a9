# SPDX-License-Identifier: Apache-2.0
"""Takes a failed worker out of discovery at once: Dynamo's own lease would keep it there for half a minute.

Dynamo writes all keys of a worker under one lease; its id is the instance's (``v1/instances/NAMESPACE/COMPONENT/ENDPOINT/ID``, hexadecimal).
Whoever may write these keys may revoke it; the runtime then finds its lease gone, and ends, which is what a worker that failed does anyway.
"""

from __future__ import annotations

import contextlib
import time
from typing import TYPE_CHECKING

from dynamo_mpi.control_plane.etcd import Etcd
from dynamo_mpi.control_plane.etcd_auth import EtcdAuth
from dynamo_mpi.control_plane.probe import etcd_endpoints
from dynamo_mpi.errors import BootstrapError
from dynamo_mpi.supervision.hooks import WorkerHook

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

_SECONDS = 1.0
_LOOK_SECONDS = 0.02


class Departure(WorkerHook):
    """The way out of discovery, for one worker.

    Args:
        endpoint: ``dyn://namespace.component.endpoint``.
        environ: where etcd and our credentials stand.
        on_lease: called with the lease's id, once it is known.

    Attributes:
        has_left: the worker is out of discovery.
    """

    def __init__(
        self, endpoint: str, environ: Mapping[str, str], on_lease: Callable[[int], object] = lambda _: None
    ) -> None:
        self._prefix = "v1/instances/" + endpoint.removeprefix("dyn://").replace(".", "/")
        self._environ, self._on_lease = environ, on_lease
        self._etcd: Etcd | None = None
        self._instance = self._lease = 0
        self.has_left = False

    def prepare(self, instance: int) -> None:
        """Connect, and find the lease of an instance that registers, so that `leave` takes no longer than it has to. Does not raise.

        Waits, a second at the most, until the instance is there: Dynamo's runtime writes the model first, and the two in no order of ours.

        Args:
            instance: its id, as Dynamo's runtime has it.
        """
        end = time.monotonic() + _SECONDS
        with contextlib.suppress(BootstrapError, ImportError):  # the keys go with the lease's time, then
            self._etcd = Etcd(etcd_endpoints(self._environ), EtcdAuth.of(self._environ), _SECONDS)
            self._instance = instance
            while not self._find() and time.monotonic() < end:
                time.sleep(_LOOK_SECONDS)

    def on_failure_detected(self) -> None:
        """Revoke the lease: no request must come here any more."""
        self.leave()

    def leave(self) -> bool:
        """Revoke the lease, in two seconds at the most, and return whether the worker is out of discovery. Does not raise."""
        if self._etcd is not None:
            with contextlib.suppress(BootstrapError):
                self._find()
                if self._lease:
                    self._etcd.revoke(self._lease, _SECONDS)
                    self.has_left = True
        return self.has_left

    def finish(self) -> None:
        """After an orderly end, revoke what the runtime may have been unable to: it never renews a password's token, and can't deregister
        once that has ended. Two seconds at the most; does not raise."""
        with contextlib.suppress(BootstrapError):
            if EtcdAuth.of(self._environ).username:
                self.leave()

    def _find(self) -> bool:
        """Look for the instance and its lease, and tell whether it is there."""
        if self._etcd is None or self._lease:
            return True
        entries = self._etcd.entries(f"{self._prefix}/{self._instance:x}")
        # an instance without a lease of its own is nothing that we know
        self._lease = next((entry.lease for entry in entries if entry.lease == self._instance), 0)
        if self._lease:
            self._on_lease(self._lease)
        return bool(entries)
