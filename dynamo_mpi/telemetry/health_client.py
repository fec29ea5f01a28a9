# SPDX-License-Identifier: Apache-2.0
"""A rank's side of the answers to probes: tells what it does, and now and then that it lives. Nothing here raises or waits."""

from __future__ import annotations

import contextlib
import socket
import threading
from typing import TYPE_CHECKING

from dynamo_mpi.common.safe_text import shown
from dynamo_mpi.supervisor.rendezvous import Meeting
from dynamo_mpi.telemetry.health_state import fold

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from dynamo_mpi.supervisor.heartbeat_client import Lifeline
    from dynamo_mpi.telemetry.health_address import ProbeAddress

_SETTLE_SECONDS = 0.05


class Reporter:
    """Tells.

    Args:
        connection: to the process that answers.
        address: where that listens.
        pid: that process.
        heartbeat_timeout: see `Meeting`.
    """

    def __init__(
        self, connection: socket.socket, address: ProbeAddress, pid: int, heartbeat_timeout: float | None
    ) -> None:
        self.address, self.pid = address, pid
        self._connection = connection
        connection.setblocking(False)
        self._period = Meeting("", heartbeat_timeout=heartbeat_timeout).period
        # a signal's handler may tell something while the thread that it interrupts does
        self._lock = threading.RLock()
        self._unsent = b""
        self._news = threading.Event()
        self._collect: Callable[[], Mapping[str, str]] | None = None

    def begin(self) -> None:
        """Show regularly that this rank lives. Only once nothing is forked any more."""
        threading.Thread(target=self._run, name="probes", daemon=True).start()

    def tell(self, word: str, text: str = "") -> None:
        """Tell one thing, by a word of `State`'s."""
        line = f"{word} {text}".rstrip(" ").encode("utf-8", "replace") + b"\n"
        with self._lock:
            self._unsent += line
            self._flush()
        self._news.set()

    def tell_phase(self, phase: str) -> None:
        """Tell which phase this rank begins."""
        self.tell("phase", phase)

    def tell_world(self, phase: str) -> None:
        """Tell which phase rank 0 says that the world begins."""
        self.tell("world", phase)

    def tell_end(self, why: str = "") -> None:
        """Tell that the world ends because of a failure."""
        self.tell("ending", fold(shown(why)))

    def tell_facts(self, facts: Mapping[str, str]) -> None:
        """Tell what the worker is."""
        for word, text in facts.items():
            self.tell(word, fold(text))

    def follow(self, lifeline: Lifeline, facts: Mapping[str, str]) -> None:
        """Tell what rank 0 lets this rank know of the world."""
        self.tell_facts(facts)
        lifeline.listen(self.tell_world)
        lifeline.on_end(self.tell_end)
        self.tell_world(lifeline.world_phase)

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
                numbers = "".join(f"{word} {fold(text)}\n" for word, text in collected.items())
            with self._lock:
                # where it reads nothing, what it has missed is told once it does
                if not self._unsent:
                    self._unsent = (numbers or "beat\n").encode()
                self._flush()
            threading.Event().wait(_SETTLE_SECONDS)
