# SPDX-License-Identifier: Apache-2.0
"""Tells a supervisor that speaks systemd's notification protocol (``$NOTIFY_SOCKET``) how far the worker is. Rank 0 alone does.

Nothing imports this module unless that variable is set.
"""

from __future__ import annotations

import contextlib
import socket
from typing import TYPE_CHECKING

from dynamo_mpi.common.hooks import WorkerHook
from dynamo_mpi.common.safe_text import safe_first_line

if TYPE_CHECKING:
    from collections.abc import Mapping, MutableMapping

    from dynamo_mpi.common.hooks import WorldFailure

VARIABLE = "NOTIFY_SOCKET"
# beyond our own deadline, which tells more than a supervisor's
_MARGIN_SECONDS = 30.0


class SystemdNotifier(WorkerHook):
    """Sends notifications, each a datagram. A supervisor that has gone, or reads nothing, is no reason to wait or to fail.

    Args:
        place: the socket's path, or with ``@`` its name in Linux's abstract name space.
        seconds: how long phases may take, by our own deadlines.

    Attributes:
        worker: what serves, for people.
    """

    def __init__(self, place: str, seconds: Mapping[str, float]) -> None:
        self._address = "\0" + place[1:] if place.startswith("@") else place
        self.seconds = dict(seconds)
        self.worker = ""

    @classmethod
    def from_env(cls, environ: MutableMapping[str, str], seconds: Mapping[str, float]) -> SystemdNotifier | None:
        """Return one for what the variable names, and forget the variable: what this rank starts has nothing to say there.

        Returns:
            None where it names nothing that can be a unix socket.
        """
        place = environ.pop(VARIABLE, "")
        return cls(place, seconds) if place[:1] in ("/", "@") and len(place) > 1 else None

    def on_phase(self, phase: str) -> None:
        """Tell which phase begins, and how long it may take before we end it ourselves."""
        lines = [f"STATUS={phase}"]
        if phase == "drain":
            lines.append("STOPPING=1")
        if seconds := self.seconds.get(phase):
            lines.append(f"EXTEND_TIMEOUT_USEC={int((seconds + _MARGIN_SECONDS) * 1e6)}")
        self._send(*lines)

    def on_ready(self) -> None:
        """Tell that requests are answered."""
        self._send("READY=1", f"STATUS=serving {self.worker}")

    def on_failure(self, failure: WorldFailure) -> None:
        """Tell why it ends."""
        self.report_failure(failure.report)

    def report_failure(self, text: str) -> None:
        """Tell why it ends, before there is a world."""
        self._send(f"STATUS=failed: {safe_first_line(text)}", "STOPPING=1")

    def _send(self, *lines: str) -> None:
        with (
            contextlib.suppress(OSError, ValueError),
            socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sender,
        ):
            sender.setblocking(False)
            sender.sendto("\n".join(lines).encode("utf-8", "replace"), self._address)
