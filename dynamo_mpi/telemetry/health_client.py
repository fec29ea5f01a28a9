# SPDX-License-Identifier: Apache-2.0
"""A rank's side of the health server: sends the rank's state, and heartbeats. Nothing here raises or waits."""

from __future__ import annotations

import contextlib
import socket
import threading
from typing import TYPE_CHECKING

from dynamo_mpi.common.redact import safe_first_line
from dynamo_mpi.supervisor.rendezvous import Rendezvous
from dynamo_mpi.telemetry.health_state import escape

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from dynamo_mpi.supervisor.heartbeat_client import HeartbeatClient
    from dynamo_mpi.telemetry.health_address import HealthAddress

_SETTLE_SECONDS = 0.05


class HealthClient:
    """Sends a rank's state to the health server.

    Args:
        connection: the connection to the health server's process.
        address: the health server's address.
        pid: the health server's process id.
        heartbeat_timeout: see `Rendezvous`.
    """

    def __init__(
        self, connection: socket.socket, address: HealthAddress, pid: int, heartbeat_timeout: float | None
    ) -> None:
        self.address, self.pid = address, pid
        self._connection = connection
        connection.setblocking(False)
        self._period = Rendezvous("", heartbeat_timeout=heartbeat_timeout).heartbeat_interval
        # a signal handler may send something while the thread that it interrupts is sending
        self._lock = threading.RLock()
        self._unsent = b""
        self._news = threading.Event()
        self._collect: Callable[[], Mapping[str, str]] | None = None

    def start(self) -> None:
        """Start to send heartbeats. Call it after the last fork."""
        threading.Thread(target=self._run, name="probes", daemon=True).start()

    def send(self, word: str, text: str = "") -> None:
        """Send one value; ``word`` is one that `health_state.note` knows."""
        line = f"{word} {text}".rstrip(" ").encode("utf-8", "replace") + b"\n"
        with self._lock:
            self._unsent += line
            self._flush()
        self._news.set()

    def send_phase(self, phase: str) -> None:
        """Send the phase that this rank begins."""
        self.send("phase", phase)

    def send_world_phase(self, phase: str) -> None:
        """Send the phase that the world begins, as rank 0 has announced it."""
        self.send("world", phase)

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
        """Send the values that ``collect`` returns, regularly and after the start of each phase."""
        self._collect = collect
        self._news.set()

    def _flush(self) -> None:
        try:
            while self._unsent:
                self._unsent = self._unsent[self._connection.send(self._unsent) :]
        except BlockingIOError:
            return
        except OSError:  # the health server has exited
            self._unsent = b""

    def _run(self) -> None:
        while True:
            self._news.wait(self._period)
            # collect what arrives together
            self._news.clear()
            numbers = ""
            with contextlib.suppress(Exception):  # a number that can't be read must not stop the heartbeats
                collected = self._collect() if self._collect else {}
                numbers = "".join(f"{word} {escape(text)}\n" for word, text in collected.items())
            with self._lock:
                # if the server doesn't read, the values are sent when it does
                if not self._unsent:
                    self._unsent = (numbers or "beat\n").encode()
                self._flush()
            threading.Event().wait(_SETTLE_SECONDS)
