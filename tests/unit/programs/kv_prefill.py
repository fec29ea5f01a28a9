# SPDX-License-Identifier: Apache-2.0
"""A prefill host of the KV check that shares its pattern by NIXL: kv_prefill.py KEY PATTERNS_KEY; prints its source as JSON."""

from __future__ import annotations

import json
import sys

from dynamo_mpi.checks.kv_pull import NixlAgent, PatternServer, pattern

if __name__ == "__main__":
    key, agent, server = bytes.fromhex(sys.argv[1]), NixlAgent(), PatternServer("127.0.0.1")
    shared = agent.share(pattern(bytes.fromhex(sys.argv[2]), "p"))
    server.start(key, b"")
    print(json.dumps(["p", "127.0.0.1", server.port, *shared]), flush=True)
    while True:
        agent.progress()
