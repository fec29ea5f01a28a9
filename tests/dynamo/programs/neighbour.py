# SPDX-License-Identifier: Apache-2.0
"""Somebody else on the node: tries to read what isn't theirs, to come in where they aren't a rank, and to end what they didn't start.

Reads its task as JSON from stdin, writes what it got as JSON to stdout. Needs nothing but the standard library.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import sys
import time
from pathlib import Path
from typing import Any

SECONDS = 5.0
LIVENESS_JOIN = 2
MOST_FILE_BYTES = 1 << 20


def main() -> None:
    task = json.load(sys.stdin)
    secrets = [secret.encode() for secret in task["secrets"]]
    result: dict[str, Any] = {
        "uid": os.getuid(),
        "environments": [pid for pid in task["pids"] if holds(Path(f"/proc/{pid}/environ"), [b"="])],
        "command_lines": [str(path) for path in Path("/proc").glob("[0-9]*/cmdline") if holds(path, secrets)],
        "files": find(task["folders"], secrets),
        "signals": [pid for pid in task["pids"] if signalled(pid)],
        "agents": {name: talk_to(name) for name in agents()},
        "ports": {f"{address}:{port}": knock(address, port) for address, port in task["ports"]},
    }
    json.dump(result, sys.stdout)


def holds(path: Path, texts: list[bytes]) -> bool:
    try:
        with path.open("rb") as file:
            content = file.read(MOST_FILE_BYTES)
    except OSError:
        return False
    return any(text in content for text in texts)


def find(folders: list[str], secrets: list[bytes]) -> list[str]:
    """Return the files with a secret that can be read."""
    return [
        str(Path(folder) / name)
        for top in folders
        for folder, _, names in os.walk(top)
        for name in names
        if (Path(folder) / name).is_file() and holds(Path(folder) / name, secrets)
    ]


def signalled(pid: int) -> bool:
    try:
        os.kill(pid, signal.SIGTERM)
    except OSError:
        return False
    return True


def agents() -> list[str]:
    """Return the addresses of unix sockets that look like ours: names in the abstract name space, and files."""
    addresses = [line.split(maxsplit=7)[-1] for line in Path("/proc/net/unix").read_text(errors="replace").splitlines()]
    return sorted({address for address in addresses if "dynamo_mpi" in address})


def talk_to(name: str) -> str:
    """Come in as a rank would, say that it has failed, and return what comes back."""
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(SECONDS)
        try:
            connection.connect("\0" + name[1:] if name.startswith("@") else name)
            connection.sendall(b"rank 1\nphase load\nfailed 70\n")
            return connection.recv(4096).decode(errors="replace") or "closed"
        except TimeoutError:
            return "silent"
        except OSError as error:
            return type(error).__name__


def knock(address: str, port: int) -> str:
    """Come in by a port, as a rank without the token if that is what it is for, else with nonsense; return what follows."""
    with contextlib.ExitStack() as stack:
        # strangers that only take places
        for _ in range(20):
            with contextlib.suppress(OSError):
                stack.enter_context(socket.create_connection((address, port), SECONDS))
        try:
            connection = stack.enter_context(socket.create_connection((address, port), SECONDS))
            connection.settimeout(SECONDS)
            hello = b""
            with contextlib.suppress(TimeoutError):
                connection.settimeout(0.5)
                hello = connection.recv(4096)
            connection.settimeout(SECONDS)
            if hello.startswith(b"DML1"):
                body = (1).to_bytes(4, "big") + os.urandom(16) + os.urandom(32)
                connection.sendall(hello[:4] + bytes([LIVENESS_JOIN, 0, 0, 0]) + len(body).to_bytes(4, "big") + body)
                return "liveness: " + until_end(connection)
            connection.sendall(os.urandom(512))
            return "other: " + until_end(connection)
        except OSError as error:
            return type(error).__name__


def until_end(connection: socket.socket) -> str:
    end = time.monotonic() + SECONDS
    received = 0
    try:
        while time.monotonic() < end:
            part = connection.recv(4096)
            if not part:
                return f"closed after {received} bytes"
            received += len(part)
    except ConnectionError:
        return f"closed after {received} bytes"
    except TimeoutError:
        return f"open, {received} bytes"
    return f"open, {received} bytes"


if __name__ == "__main__":
    main()
