# SPDX-License-Identifier: Apache-2.0
"""Sends the worker's state to a service manager by systemd's notification protocol (``$NOTIFY_SOCKET``), from rank 0 only.

This module is imported only if that variable is set.
"""

from __future__ import annotations

import contextlib
import socket
from typing import TYPE_CHECKING

from dynamo_mpi.common.hooks import WorkerHook
from dynamo_mpi.common.redact import safe_first_line

if TYPE_CHECKING:
    from collections.abc import Mapping, MutableMapping

    from dynamo_mpi.common.hooks import WorldFailure

VARIABLE = "NOTIFY_SOCKET"
# beyond our own deadline, whose report has more detail than a service manager's
_MARGIN_SECONDS = 30.0


class SystemdNotifier(WorkerHook):
    """Sends notifications, each as one datagram. It neither waits nor fails if the service manager has ended or doesn't read.

    Args:
        place: the socket's path, or with ``@`` its name in Linux's abstract name space.
        seconds: the deadlines of phases.

    Attributes:
        worker: the worker's name in messages.
    """

    def __init__(self, place: str, seconds: Mapping[str, float]) -> None:
        self._address = "\0" + place[1:] if place.startswith("@") else place
        self.seconds = dict(seconds)
        self.worker = ""

    @classmethod
    def from_env(cls, environ: MutableMapping[str, str], seconds: Mapping[str, float]) -> SystemdNotifier | None:
        """Return one for the variable's socket, and remove the variable, so that child processes don't use it.

        Returns:
            None if it does not name a unix socket.
        """
        place = environ.pop(VARIABLE, "")
        return cls(place, seconds) if place[:1] in ("/", "@") and len(place) > 1 else None

    def on_phase(self, phase: str) -> None:
        """Send the phase that begins, and its time limit."""
        lines = [f"STATUS={phase}"]
        if phase == "drain":
            lines.append("STOPPING=1")
        if seconds := self.seconds.get(phase):
            lines.append(f"EXTEND_TIMEOUT_USEC={int((seconds + _MARGIN_SECONDS) * 1e6)}")
        self._send(*lines)

    def on_ready(self) -> None:
        """Send that the worker serves."""
        self._send("READY=1", f"STATUS=serving {self.worker}")

    def on_failure(self, failure: WorldFailure) -> None:
        """Send why the worker ends."""
        self.report_failure(failure.report)

    def report_failure(self, text: str) -> None:
        """Send why the worker ends, before MPI is initialised."""
        self._send(f"STATUS=failed: {safe_first_line(text)}", "STOPPING=1")

    def _send(self, *lines: str) -> None:
        with (
            contextlib.suppress(OSError, ValueError),
            socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sender,
        ):
            sender.setblocking(False)
            sender.sendto("\n".join(lines).encode("utf-8", "replace"), self._address)
