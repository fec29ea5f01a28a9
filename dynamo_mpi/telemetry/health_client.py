# SPDX-License-Identifier: Apache-2.0
"""A rank's side of the health endpoint: sends the rank's state to the node agent. Nothing here raises or waits."""

from __future__ import annotations

import contextlib
import threading
import time

from dynamo_mpi.common.light_typing import TYPE_CHECKING
from dynamo_mpi.common.redact import safe_first_line
from dynamo_mpi.common.waiting import start_thread
from dynamo_mpi.supervisor.rendezvous import Rendezvous
from dynamo_mpi.telemetry.health_state import escape

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from dynamo_mpi.supervisor.agent_client import NodeAgentClient
    from dynamo_mpi.supervisor.heartbeat_client import HeartbeatClient
    from dynamo_mpi.telemetry.health_address import HealthAddress

_SETTLE_SECONDS = 0.05


class HealthClient:
    """Sends a rank's state to its node agent, which answers health requests.

    Args:
        agent: the connection to the node agent.
        address: where the agent answers.
        heartbeat_timeout: see `Rendezvous`.
    """

    def __init__(self, agent: NodeAgentClient, address: HealthAddress, heartbeat_timeout: float | None) -> None:
        self.address, self._agent = address, agent
        self._period = Rendezvous("", heartbeat_timeout=heartbeat_timeout).heartbeat_interval
        self._changed = threading.Event()

    def send(self, word: str, text: str = "") -> None:
        """Send one value; ``word`` is one that `health_state.note` knows."""
        self._agent.send(f"health {word} {text}".rstrip(" "))
        self._changed.set()

    def send_phase(self, phase: str) -> None:
        """Send the phase that this rank begins."""
        self.send("phase", f"{phase} {time.time()}")

    def send_world_phase(self, phase: str) -> None:
        """Send the phase that the world begins, as rank 0 has announced it."""
        self.send("world", f"{phase} {time.time()}")

    def send_failure(self, why: str = "") -> None:
        """Send that the world ends because of a failure."""
        self.send("ending", escape(safe_first_line(why)))

    def send_facts(self, facts: Mapping[str, str]) -> None:
        """Send the worker's facts."""
        for word, text in facts.items():
            self.send(word, escape(text))

    def follow(self, client: HeartbeatClient, facts: Mapping[str, str]) -> None:
        """Send what rank 0 announces about the world."""
        self.send_facts(facts)
        client.on_phase(self.send_world_phase)
        client.on_abort(self.send_failure)
        self.send_world_phase(client.world_phase)

    def collect_by(self, collect: Callable[[], Mapping[str, str]]) -> None:
        """Send the values that ``collect`` returns, regularly and after the start of each phase, from a thread."""
        start_thread(lambda: self._run(collect), "health")

    def _run(self, collect: Callable[[], Mapping[str, str]]) -> None:
        while True:
            # what is sent below must not wake this thread
            self._changed.clear()
            with contextlib.suppress(Exception):  # a number that can't be read must not stop the others
                for word, text in collect().items():
                    self._agent.send(f"health {word} {escape(text)}")
            self._changed.wait(self._period)
            # collect what changes together
            time.sleep(_SETTLE_SECONDS)
