# SPDX-License-Identifier: Apache-2.0
"""etcd, where frontend and workers find each other, as a child process."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from dynamo_mpi.services.asking import get_json
from dynamo_mpi.services.ports import LOOPBACK, in_url

if TYPE_CHECKING:
    from pathlib import Path

    from dynamo_mpi.services.certificates import Certificates


@dataclass(frozen=True)
class Etcd:
    """Discovery. Its data is worth nothing after the run, so it skips fsync.

    Args:
        binary: etcd itself.
        port: for clients.
        data: folder that it makes.
        host: the address for clients.
        certificates: mutual TLS for clients and peers; None takes anybody.
    """

    binary: Path
    port: int
    data: Path
    name: str = "etcd"
    host: str = LOOPBACK
    certificates: Certificates | None = None

    @property
    def url(self) -> str:
        scheme = "http" if self.certificates is None else "https"
        return f"{scheme}://{in_url(self.host)}:{self.port}"

    def command(self) -> tuple[str, ...]:
        # Port 0: nobody joins a cluster of one, so its peer port may be any.
        peer = f"{'http' if self.certificates is None else 'https'}://{LOOPBACK}:0"
        return (
            *(str(self.binary), "--data-dir", str(self.data), "--log-level", "warn", "--unsafe-no-fsync"),
            *("--listen-client-urls", self.url, "--advertise-client-urls", self.url),
            *("--listen-peer-urls", peer, "--initial-advertise-peer-urls", peer),
            *("--initial-cluster", f"default={peer}"),
            *("--heartbeat-interval", "20", "--election-timeout", "100"),  # it elects itself: no second to wait
            *self._tls_flags(),
        )

    def environment(self) -> dict[str, str]:
        # it would tell a supervisor of ours, systemd say, that we are ready
        return {"NOTIFY_SOCKET": ""}

    def answers(self) -> bool:
        tls = None if self.certificates is None else self.certificates.client_context
        status, body = get_json(self.port, "/health", host=self.host, tls=tls)
        return status == 200 and str(body.get("health")) == "true"

    def _tls_flags(self) -> tuple[str, ...]:
        if self.certificates is None:
            return ()
        files = self.certificates
        flags: list[str] = []
        for side, only in (("", "--client-cert-auth"), ("peer-", "--peer-client-cert-auth")):
            flags += [f"--{side}cert-file", str(files.server), f"--{side}key-file", str(files.server_key)]
            flags += [f"--{side}trusted-ca-file", str(files.authority), only]
        return tuple(flags)
