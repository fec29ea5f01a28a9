# SPDX-License-Identifier: Apache-2.0
"""A real etcd with what workers would have written there, for the commands that read it."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterator
from typing import Any

from dynamo_mpi.discovery.etcd import EtcdAuth
from dynamo_mpi.discovery.etcd_grpc import GrpcEtcdClient
from tests.servers import running_etcd
from tests.unit.worlds import world

ROOT = "dynamo_mpi/v1/"
_LEASE_SECONDS = 3600
FAILURE = {
    "schema": 1,
    "endpoint": "dyn://dynamo.backend.generate",
    "model": "M",
    "launch": None,
    "job": "12",
    "step": "0",
    "attempt": 1,
    "rank": 3,
    "host": "n4",
    "phase": "load",
    "cause": "disconnect",
    "exit_code": 137,
    "error": "killed by SIGKILL",
    "report": "rank 3 on n4: killed by SIGKILL\nmore",
}


class Board:
    """What stands in an etcd.

    Args:
        url: etcd's.
    """

    def __init__(self, url: str) -> None:
        self.url = url
        self.etcd = GrpcEtcdClient([url], EtcdAuth(), 5)
        self._lease = self.etcd.grant(_LEASE_SECONDS).id

    def put(self, key: str, content: Any) -> str:
        """Write something under ``dynamo_mpi/v1/``; bytes as they are, anything else as JSON."""
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.etcd.put(ROOT + key, data, self._lease)
        return ROOT + key

    def worker(self, kind: str, lease: str = "a", **changes: Any) -> str:
        """Write a world record; an older version's where no newer field is among the changes. Returns its key."""
        content = {**json.loads(world(kind, started=time.time() - 100).pack()), **changes}
        return self.put(f"worlds/{content['namespace']}/{content['component']}/{lease}", content)

    def failure(self, role: str, lease: str = "f", **changes: Any) -> str:
        """Write a failure, as of now; returns its key."""
        content = {
            **FAILURE,
            "role": role,
            "time": time.time(),
            "namespace": "dynamo",
            "component": "prefill" if role == "prefill" else "backend",
            **changes,
        }
        return self.put(f"failures/{content['namespace']}/{content['component']}/{lease}", content)

    def card(self, instance: str, namespace: str = "dynamo", **content: Any) -> str:
        """Write a model card as Dynamo does; returns its key."""
        key, card = f"v1/mdc/{namespace}/backend/generate/{instance}", {"worker_type": "aggregated", **content}
        self.etcd.put(key, json.dumps({"type": "Model", "card_json": card}).encode(), self._lease)
        return key

    def remove(self, key: str) -> None:
        """Take something away."""
        import pyetcd

        host, _, port = self.url.removeprefix("http://").partition(":")
        with contextlib.closing(pyetcd.client(host=host, port=int(port))) as client:
            client.delete(key)

    def wipe(self) -> None:
        """Take all away."""
        self.etcd.revoke(self._lease)
        self._lease = self.etcd.grant(_LEASE_SECONDS).id


@contextlib.contextmanager
def running_board() -> Iterator[Board]:
    """Run an etcd until the block ends."""
    with running_etcd() as url:
        board = Board(url)
        try:
            yield board
        finally:
            board.etcd.close()
