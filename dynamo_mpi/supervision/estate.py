# SPDX-License-Identifier: Apache-2.0
"""What a worker has in etcd, and who takes it away when rank 0 can't any more."""

from __future__ import annotations

import os
import threading
from typing import TYPE_CHECKING, Any

from dynamo_mpi.supervision.heir import will_of

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from dynamo_mpi.supervision.tie import Tie


class Estate:
    """Keeps the heirs informed: rank 0's companion, and the one on another node.

    Args:
        tie: to the companion.
    """

    def __init__(self, tie: Tie) -> None:
        self._tie = tie
        self._leases: dict[str, int] = {}
        self._worker: dict[str, Any] = {}
        self._lock = threading.Lock()
        self._tell_heir: Callable[[str], object] | None = None

    def has_heir(self, label: str) -> bool:
        """Tell whether there is a companion, and have it know of the verdict, and name its failure files by ``label`` as rank 0 does."""
        self._tie.tell(f"label {label}")
        self._tie.tell("judged")
        return self._tie.holds

    def introduce(self, worker: Mapping[str, Any]) -> None:
        """Say whose it is, for what the heirs leave in etcd; no secret may be in it. Before anything is owned."""
        self._worker = dict(worker)

    @property
    def record(self) -> int:
        """The lease of the world record; 0 where there is none."""
        return self._leases.get("record", 0)

    def own(self, name: str, lease: int) -> None:
        """Take note of a lease.

        Args:
            name: what it is for; there is one for each.
            lease: its id.
        """
        # the record's lease comes from one thread, the instance's from another
        with self._lock:
            self._leases[name] = lease
            will = self._will()
            self._tie.tell(f"heir {will}")
            if self._tell_heir is not None:
                self._tell_heir(will)

    def share(self, tell_heir: Callable[[str], object]) -> None:
        """Tell what there is, and what comes, to the heir on another node as well.

        Args:
            tell_heir: carries one line there; no secret may be in it.
        """
        self._tell_heir = tell_heir
        if self._leases:
            tell_heir(self._will())

    def leave_signals(self) -> None:
        """From here on rank 0 knows better what to do about a signal. From the main thread, before the handlers that come next."""
        self._tie.leave_signals()

    def explain(self) -> None:
        """Have the companion know that rank 0 says itself why it ends."""
        self._tie.tell("told")

    def _will(self) -> str:
        endpoints = os.environ.get("ETCD_ENDPOINTS", "")
        # credentials are in each node's own environment
        place = {"ETCD_ENDPOINTS": endpoints} if endpoints and "@" not in endpoints else {}
        return will_of(self._leases, place, self._worker, self.record)
