# SPDX-License-Identifier: Apache-2.0
"""Clients without credentials that only hold connections: ``strangers.py COUNT``. Needs nothing but the standard library.

It reads lines of ``[[ADDRESS, PORT], ...]`` from stdin, holds COUNT idle connections at each, and opens again what a server closes, 200 a
second for each port; one that is refused is given up. At the end of stdin it writes its numbers as JSON.
"""

from __future__ import annotations

import json
import os
import resource
import selectors
import socket
import sys
import time

REOPENED_PER_SECOND = 200


def main() -> None:
    """Hold connections until stdin ends."""
    most, hard = int(sys.argv[1]), resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    selector, text = selectors.DefaultSelector(), b""
    waiting: list[tuple[float, tuple[str, int]]] = []
    counts = {"uid": os.getuid(), "opened": 0, "closed": 0, "received": 0}
    selector.register(0, selectors.EVENT_READ)
    while True:
        for key, _ in selector.select(0.02):
            if key.fd == 0:
                part = os.read(0, 65536)
                if not part:
                    print(json.dumps(counts))
                    return
                *lines, text = (text + part).split(b"\n")
                waiting += [(0.0, tuple(place)) for line in lines for place in json.loads(line) for _ in range(most)]
                continue
            connection = key.fileobj
            assert isinstance(connection, socket.socket)
            try:
                received = len(connection.recv(4096))
            except BlockingIOError:
                continue
            except ConnectionRefusedError:
                received = -1
            except OSError:
                received = 0
            counts["received"] += max(0, received)
            if received <= 0:
                selector.unregister(connection)
                connection.close()
                counts["closed"] += 1
                if received == 0:
                    waiting.append((time.monotonic() + most / REOPENED_PER_SECOND, key.data))
        now = time.monotonic()
        due = [place for at, place in waiting if at <= now]
        waiting = [each for each in waiting if each[0] > now]
        for place in due:
            connection = socket.socket()
            connection.setblocking(False)
            connection.connect_ex(place)
            selector.register(connection, selectors.EVENT_READ, place)
            counts["opened"] += 1


if __name__ == "__main__":
    main()
