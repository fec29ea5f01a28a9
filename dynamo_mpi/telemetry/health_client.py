# SPDX-License-Identifier: Apache-2.0
"""A rank's side of the answers to probes: tells what it does, and now and then that it lives. Nothing here raises or waits."""

from __future__ import annotations

import contextlib
import socket
import threading
from typing import TYPE_CHECKING

from dynamo_mpi.common.safe_text import safe_first_line
from dynamo_mpi.supervisor.rendezvous import Rendezvous
from dynamo_mpi.telemetry.health_state import escape

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from dynamo_mpi.supervisor.heartbeat_client import HeartbeatClient
    from dynamo_mpi.telemetry.health_address import HealthAddress

_SETTLE_SECONDS = 0.05


class HealthClient:
    """Tells.

    Args:
        connection: to the process that answers.
        address: where that listens.
        pid: that process.
        heartbeat_timeout: see `Rendezvous`.
    """

    def __init__(
        self, connection: socket.socket, address: HealthAddress, pid: int, heartbeat_timeout: float | None
    ) -> None:
        self.address, self.pid = address, pid
        self._connection = connection
        connection.setblocking(False)
        self._period = Rendezvous("", heartbeat_timeout=heartbeat_timeout).heartbeat_interval
        # a signal's handler may tell something while the thread that it interrupts does
        self._lock = threading.RLock()
        self._unsent = b""
        self._news = threading.Event()
        self._collect: Callable[[], Mapping[str, str]] | None = None

    def start(self) -> None:
        """Show regularly that this rank lives. Only once nothing is forked any more."""
        threading.Thread(target=self._run, name="probes", daemon=True).start()

    def send(self, word: str, text: str = "") -> None:
        """Tell one thing, by a word of `State`'s."""
        line = f"{word} {text}".rstrip(" ").encode("utf-8", "replace") + b"\n"
        with self._lock:
            self._unsent += line
            self._flush()
        self._news.set()

    def send_phase(self, phase: str) -> None:
        """Tell which phase this rank begins."""
        self.send("phase", phase)

    def send_world_phase(self, phase: str) -> None:
        """Tell which phase rank 0 says that the world begins."""
        self.send("world", phase)

    def send_failure(self, why: str = "") -> None:
        """Tell that the world ends because of a failure."""
        self.send("ending", escape(safe_first_line(why)))

    def send_facts(self, facts: Mapping[str, str]) -> None:
        """Tell what the worker is."""
        for word, text in facts.items():
            self.send(word, escape(text))

    def follow(self, lifeline: HeartbeatClient, facts: Mapping[str, str]) -> None:
        """Tell what rank 0 lets this rank know of the world."""
        self.send_facts(facts)
        lifeline.on_phase(self.send_world_phase)
        lifeline.on_abort(self.send_failure)
        self.send_world_phase(lifeline.world_phase)

    def collect_by(self, collect: Callable[[], Mapping[str, str]]) -> None:
        """Have it tell regularly, and after each phase's beginning, what this returns, by word."""
        self._collect = collect
        self._news.set()

    def _flush(self) -> None:
        try:
            while self._unsent:
                self._unsent = self._unsent[self._connection.send(self._unsent) :]
        except BlockingIOError:
            return
        except OSError:  # it has gone, and nobody can be told
            self._unsent = b""

    def _run(self) -> None:
        while True:
            self._news.wait(self._period)
            # what comes together is told together
            self._news.clear()
            numbers = ""
            with contextlib.suppress(Exception):  # a number that can't be had is no reason to look dead
                collected = self._collect() if self._collect else {}
                numbers = "".join(f"{word} {escape(text)}\n" for word, text in collected.items())
            with self._lock:
                # where it reads nothing, what it has missed is told once it does
                if not self._unsent:
                    self._unsent = (numbers or "beat\n").encode()
                self._flush()
            threading.Event().wait(_SETTLE_SECONDS)
