# SPDX-License-Identifier: Apache-2.0
"""The leases that a worker owns in etcd. Rank 0 sends them to its node agent, which revokes them if rank 0 can't."""

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
        # credentials are in each node's own environment
        overrides = {"ETCD_ENDPOINTS": endpoints} if endpoints and "@" not in endpoints else {}
        return encode_leases(self._leases, overrides, self._worker, self.record)
