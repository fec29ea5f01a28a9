# SPDX-License-Identifier: Apache-2.0
"""Watches the nodes of a Slurm deployment in a thread: whether each answers, and what Slurm says about it.

A worker's own heartbeats find a node that is lost while another of its nodes is left; for a worker of one node, Slurm finds it after
SlurmdTimeout. A node counts as lost when it has answered none of several connections, and some other node has answered meanwhile: if none
has, it is this host that is cut off.
"""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING

from dynamo_mpi.deploy.node_health import CONNECT_SECONDS, answers, ask_slurm_about

if TYPE_CHECKING:
    from collections.abc import Sequence

    from dynamo_mpi.deploy.node_health import SlurmNode

LOOK_SECONDS = 2.0
# at each look SYNs are sent at least twice; a node that is busy answers in the kernel
SILENT_SECONDS = 6.0
# a question to slurmctld, which others need, too
SLURM_SECONDS = 15.0


class NodeWatch:
    """Watches nodes until it is closed. Thread-safe.

    Args:
        nodes: their names.
    """

    def __init__(self, nodes: Sequence[str]) -> None:
        self._nodes = tuple(dict.fromkeys(nodes))
        self._lock = threading.Lock()
        self._end = threading.Event()
        self._seen: dict[str, SlurmNode] = {}
        self._silent_since: dict[str, float] = {}
        self._thread = threading.Thread(target=self._run, name="node watch", daemon=True)

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def close(self) -> None:
        """End it. Idempotent."""
        self._end.set()

    @property
    def lost(self) -> dict[str, str]:
        """Nodes that are lost, and why."""
        with self._lock:
            found = {name: node.lost for name, node in self._seen.items() if node.lost}
            now = time.monotonic()
            silent = {name: now - since for name, since in self._silent_since.items() if now - since >= SILENT_SECONDS}
            if len(self._silent_since) < len(self._nodes):
                for name, seconds in silent.items():
                    found.setdefault(name, f"it doesn't answer for {seconds:.0f} s")
        return found

    @property
    def drained(self) -> dict[str, str]:
        """Nodes that an administrator drains, and what Slurm says."""
        with self._lock:
            return {name: node.drained for name, node in self._seen.items() if node.drained and not node.lost}

    def is_silent(self, node: str) -> bool:
        """Return whether a node has answered no connection since at least one look."""
        with self._lock:
            return node in self._silent_since

    def _run(self) -> None:
        asked = float("-inf")
        while not self._end.is_set():
            began = time.monotonic()
            if began >= asked + SLURM_SECONDS:
                asked = began
                found = ask_slurm_about(self._nodes)
                if found is not None:
                    with self._lock:
                        self._seen = found
            self._look()
            self._end.wait(max(0.0, began + LOOK_SECONDS - time.monotonic()))

    def _look(self) -> None:
        """Connect to all nodes at once."""
        with self._lock:
            known = [self._seen[name] for name in self._nodes if name in self._seen]
        looks = [_Look(node) for node in known]
        end = time.monotonic() + CONNECT_SECONDS + 1.0
        for look in looks:
            look.join(max(0.0, end - time.monotonic()))
        now = time.monotonic()
        with self._lock:
            for look in looks:
                if look.answered:
                    self._silent_since.pop(look.node.name, None)
                elif look.answered is False:
                    self._silent_since.setdefault(look.node.name, now - CONNECT_SECONDS)


class _Look(threading.Thread):
    """One connection to one node."""

    def __init__(self, node: SlurmNode) -> None:
        super().__init__(name=f"look {node.name}", daemon=True)
        self.node = node
        self.answered: bool | None = None
        self.start()

    def run(self) -> None:
        self.answered = answers(self.node.address, self.node.port)
