# SPDX-License-Identifier: Apache-2.0
"""What a worker has in etcd, as rank 0 keeps the agent of its node informed, which revokes it if rank 0 can't."""

from __future__ import annotations

import os
import threading
from typing import TYPE_CHECKING, Any

from dynamo_mpi.common.hooks import WorkerHook
from dynamo_mpi.supervisor.lease_revoker import encode_leases

if TYPE_CHECKING:
    from collections.abc import Mapping

    from dynamo_mpi.supervisor.agent_client import NodeAgentClient


class OwnedLeases(WorkerHook):
    """The leases of one worker. Its node agent hands them on to that of another node, for the case that rank 0's is lost.

    Args:
        agent: rank 0's connection to the node agent.
    """

    def __init__(self, agent: NodeAgentClient) -> None:
        self._agent = agent
        self._leases: dict[str, int] = {}
        self._worker: dict[str, Any] = {}
        self._lock = threading.Lock()

    def set_worker(self, worker: Mapping[str, Any]) -> None:
        """Say whose they are, for the failure record; no secret may be in it. Before any is added."""
        self._worker = dict(worker)

    @property
    def record(self) -> int:
        """The lease of the world record; 0 where there is none."""
        return self._leases.get("record", 0)

    def on_registered(self, lease: int) -> None:
        """Take note of the lease of Dynamo's instance."""
        self.add("instance", lease)

    def add(self, name: str, lease: int) -> None:
        """Take note of a lease.

        Args:
            name: what it is for; there is one for each.
            lease: its id.
        """
        # the record's lease comes from one thread, the instance's from another
        with self._lock:
            self._leases[name] = lease
            self._agent.send(f"leases {self._encoded()}")

    def _encoded(self) -> str:
        endpoints = os.environ.get("ETCD_ENDPOINTS", "")
        # credentials are in each node's own environment
        place = {"ETCD_ENDPOINTS": endpoints} if endpoints and "@" not in endpoints else {}
        return encode_leases(self._leases, place, self._worker, self.record)
