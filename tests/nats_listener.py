# SPDX-License-Identifier: Apache-2.0
"""Hears what goes over a test's own NATS."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit


class Received:
    """What has come: subjects and bodies, in their order."""

    def __init__(self) -> None:
        self.messages: list[tuple[str, Any]] = []

    @property
    def events(self) -> list[str]:
        """The last part of each subject; with ``phase``, the phase as well."""
        names = [(subject.rpartition(".")[2], body) for subject, body in self.messages]
        return [f"phase {body['phase']}" if name == "phase" else name for name, body in names]


@contextlib.contextmanager
def listening_to(url: str, subject: str = "dynamo_mpi.v1.>", **who: str) -> Iterator[Received]:
    """Subscribe until the block ends.

    Args:
        url: ``nats://HOST:PORT``.
        subject: may have wildcards.
        who: of NATS's ``CONNECT``: ``user`` and ``pass``, or ``auth_token``.
    """
    heard = Received()
    parts = urlsplit(url)
    with socket.create_connection((parts.hostname, parts.port or 4222), timeout=10) as connection:
        file = connection.makefile("rwb")
        assert file.readline().startswith(b"INFO ")
        file.write(f"CONNECT {json.dumps({'verbose': False, **who})}\r\nSUB {subject} 1\r\nPING\r\n".encode())
        file.flush()
        assert file.readline() == b"PONG\r\n"
        connection.settimeout(None)
        thread = threading.Thread(target=_hear, args=(file, heard), daemon=True)
        thread.start()
        try:
            yield heard
        finally:
            with contextlib.suppress(OSError):  # a server that was killed has closed it
                connection.shutdown(socket.SHUT_RDWR)
            thread.join(10)


def _hear(file: Any, heard: Received) -> None:
    with contextlib.suppress(OSError):
        while line := file.readline():
            if line.startswith(b"PING"):
                file.write(b"PONG\r\n")
                file.flush()
            elif line.startswith(b"MSG "):
                _, subject, _, size = line.split()
                heard.messages.append((subject.decode(), json.loads(file.read(int(size)))))
                file.readline()
