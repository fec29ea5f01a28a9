# SPDX-License-Identifier: Apache-2.0
"""A prefill rank that keeps one transfer and lets it be read by NIXL, until its standard input ends.

Usage: nixl_prefill.py TOKENS. Prints as JSON its port and the addresses that it listens on for NIXL. It keeps what `kept_values` makes.
"""

from __future__ import annotations

import json
import os
import socket
import struct
import sys
from pathlib import Path

import numpy as np

from dynamo_mpi.engines.reference.gguf_tensors import Float32Array
from dynamo_mpi.engines.reference.kv_arena import Arena
from dynamo_mpi.engines.reference.kv_nixl import NixlAgent
from dynamo_mpi.engines.reference.kv_server import KvServer
from dynamo_mpi.engines.reference.kv_shards import Holding
from dynamo_mpi.engines.reference.kv_store import KvStore

HOLDING = Holding(range(4), range(3))
HEAD_DIM = 64
TRANSFER, SECRET = b"t" * 16, b"s" * 32
_LISTENING = "0A"


def kept_values(tokens: int) -> Float32Array:
    return np.random.default_rng(tokens).standard_normal((2, 4, 3, tokens, HEAD_DIM), np.float32)


def listening() -> set[str]:
    """Return the IPv4 addresses that this process listens on (proc(5))."""
    ours = {os.readlink(entry.path) for entry in os.scandir("/proc/self/fd") if Path(entry.path).is_symlink()}
    rows = [line.split() for line in Path("/proc/self/net/tcp").read_text(encoding="ascii").splitlines()[1:]]
    return {
        socket.inet_ntoa(struct.pack("=I", int(row[1].partition(":")[0], 16)))
        for row in rows
        if row[3] == _LISTENING and f"socket:[{row[9]}]" in ours
    }


def main() -> None:
    tokens = int(sys.argv[1])
    nixl = NixlAgent("127.0.0.1")
    store = KvStore(tokens, keep_seconds=600)
    values = kept_values(tokens)
    store.arena = Arena(values.size)
    nixl.share(store.arena.memory)
    addresses = listening()
    store.keep(TRANSFER, SECRET, HOLDING, list(values))
    server = KvServer(store, "127.0.0.1", nixl)
    print(json.dumps({"port": server.address[1], "listening": sorted(addresses)}), flush=True)
    sys.stdin.read()
    server.close()
    nixl.close()


if __name__ == "__main__":
    main()
