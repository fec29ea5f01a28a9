# SPDX-License-Identifier: Apache-2.0
"""NATS, for events and for requests with ``--request-plane nats``, as a child process."""

from __future__ import annotations

import json
import socket
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dynamo_mpi.services.asking import PROBE_SECONDS
from dynamo_mpi.services.ports import LOOPBACK, in_url

if TYPE_CHECKING:
    from pathlib import Path


@dataclass(frozen=True)
class Nats:
    """Events, and requests with ``--request-plane nats``.

    Args:
        binary: nats-server itself.
        port: for clients.
        data: folder for JetStream's store.
        host: the address for clients.
        config: file with the credentials (`authorization`), which must not stand in a command line; None takes anybody.
    """

    binary: Path
    port: int
    data: Path
    name: str = "nats"
    host: str = LOOPBACK
    config: Path | None = None

    @property
    def url(self) -> str:
        return f"nats://{in_url(self.host)}:{self.port}"

    def command(self) -> tuple[str, ...]:
        config = () if self.config is None else ("-c", str(self.config))
        return (str(self.binary), *config, "-a", self.host, "-p", str(self.port), "-js", "-sd", str(self.data))

    def environment(self) -> dict[str, str]:
        return {}

    def answers(self) -> bool:
        try:
            with socket.create_connection((self.host, self.port), timeout=PROBE_SECONDS) as connection:
                return connection.recv(5) == b"INFO "
        except OSError:
            return False


def authorization(user: str, password: str) -> str:
    """Return a configuration that lets one user in. NATS reads JSON's strings as its own."""
    return f"authorization {{ user: {json.dumps(user)}, password: {json.dumps(password)} }}\n"
