# SPDX-License-Identifier: Apache-2.0
"""Watches the nodes of a Slurm deployment in a thread: whether each answers, and what Slurm says about it.

A worker's own heartbeats find a node that is lost while another of its nodes is left; for a worker of one node, Slurm finds it after
SlurmdTimeout. A node counts as lost when it has answered none of several connections, while another node, or slurmctld, has answered: if
none has, it is this host that is cut off. That Slurm calls it "not responding" counts only together with that: slurmd may be restarted.
"""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING

from dynamo_mpi.deploy.node_health import SUSPICIOUS, answering, ask_slurm_about
from dynamo_mpi.deploy.nodes import is_this_host

if TYPE_CHECKING:
    from collections.abc import Sequence

    from dynamo_mpi.deploy.node_health import SlurmNode

# slurmd logs an error for each connection without a message: seldom, until there is a first sign that a node is ill
CALM_SECONDS = 15.0
LOOK_SECONDS = 2.0
# so long after a failure, or the first sign; in the first of them, what follows is decided
HURRY_SECONDS, FIRST_SECONDS = 60.0, 10.0
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
        self._reached = float("-inf")
        self._hurry_until = float("-inf")
        self._controller_answers = True
        self._ill: set[str] = set()
        self._wake = threading.Event()
        self._thread = threading.Thread(target=self._run, name="node watch", daemon=True)

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def close(self) -> None:
        """End it. Idempotent."""
        self._end.set()
        self._wake.set()

    def hurry(self) -> None:
        """Look at once, and often for a while: something has failed."""
        with self._lock:
            self._hurry_until = time.monotonic() + HURRY_SECONDS
        self._wake.set()

    @property
    def is_hurried(self) -> bool:
        """Whether something has failed, or may have, some seconds ago."""
        with self._lock:
            return time.monotonic() < self._hurry_until - HURRY_SECONDS + FIRST_SECONDS

    @property
    def controller_answers(self) -> bool:
        """Whether slurmctld has answered the last question, as far as one has ended."""
        with self._lock:
            return self._controller_answers

    @property
    def lost(self) -> dict[str, str]:
        """Nodes that are lost, and why."""
        with self._lock:
            found = {name: node.lost for name, node in self._seen.items() if node.lost}
            now = time.monotonic()
            for name, since in self._silent_since.items():
                node = self._seen.get(name)
                says = node.no_response if node is not None else ""
                if self._reached > since and (says or now - since >= SILENT_SECONDS):
                    found.setdefault(name, says or f"it doesn't answer for {now - since:.0f} s")
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

    def is_unreachable(self, node: str) -> bool:
        """Return whether a node has answered no connection since at least one look, at which another node, or since which slurmctld, has
        answered: so it isn't this host that is cut off."""
        with self._lock:
            return self._reached >= self._silent_since.get(node, float("inf"))

    def _run(self) -> None:
        asked = float("-inf")
        while not self._end.is_set():
            began = time.monotonic()
            # Slurm may take seconds to answer, but it is Slurm that knows the addresses
            if is_known := bool(self._seen):
                self._look()
            with self._lock:
                is_alone = bool(self._silent_since) and self._reached <= max(self._silent_since.values())
                is_asked_often = is_alone or not self._controller_answers or began < self._hurry_until
            if began >= asked + (LOOK_SECONDS if is_asked_often else SLURM_SECONDS):
                asked = began
                found = ask_slurm_about(self._nodes)
                with self._lock:
                    self._controller_answers = found is not None
                    if found is not None:
                        self._seen, self._reached = found, max(self._reached, began)
            if not is_known:
                self._look()
            self._wake.wait(max(0.0, began + self._period() - time.monotonic()))
            self._wake.clear()

    def _period(self) -> float:
        """Return the seconds until the next look."""
        with self._lock:
            now = time.monotonic()
            ill = {*self._silent_since, *(name for name, node in self._seen.items() if node.states & SUSPICIOUS)}
            if ill - self._ill:  # those that stay ill are known
                self._hurry_until = now + HURRY_SECONDS
            self._ill = ill
            return LOOK_SECONDS if now < self._hurry_until else CALM_SECONDS

    def _look(self) -> None:
        """Connect to all nodes at once."""
        with self._lock:
            known = [self._seen[name] for name in self._nodes if name in self._seen]
        began = time.monotonic()
        found = answering(known)
        with self._lock:
            for name, is_there in found.items():
                if is_there:
                    self._silent_since.pop(name, None)
                    # this host's own slurmd answers without a network
                    self._reached = self._reached if is_this_host(name) else began
                elif is_there is False:
                    self._silent_since.setdefault(name, began)
