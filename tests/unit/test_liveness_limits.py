# SPDX-License-Identifier: Apache-2.0
"""Rank 0 where it can't listen, or may open few files: real limits and real sockets, in processes of their own."""

from __future__ import annotations

import os
import subprocess
import sys

from tests.conftest import ROOT

RANKS = 200
PREPARE = """
import queue, resource, secrets, socket, sys
from dynamo_mpi.common.errors import DynamoMpiError
from dynamo_mpi.supervisor.join import connect
from dynamo_mpi.supervisor.heartbeat_protocol import TOKEN_BYTES
from dynamo_mpi.supervisor.heartbeat_server import RankEvents, HeartbeatServer
from dynamo_mpi.supervisor.rendezvous import Rendezvous
from dynamo_mpi.common.process import raise_nofile_limit
from dynamo_mpi.supervisor.join import MAX_PENDING
soft, hard, ranks = map(int, sys.argv[1:4])
resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
try:
    raise_nofile_limit(ranks + MAX_PENDING)
except DynamoMpiError as error:
    print(error)
    sys.exit(int(error.exit_code))
print(*resource.getrlimit(resource.RLIMIT_NOFILE))
"""
CONNECT = (
    PREPARE
    + """
listener = socket.create_server(("127.0.0.1", 0), backlog=ranks)
rendezvous = Rendezvous("here", "127.0.0.1", listener.getsockname()[1], secrets.token_hex(TOKEN_BYTES))
server = HeartbeatServer(ranks + 1, rendezvous, listener, lambda: "serve", str, RankEvents(print, print))
server.start()
lines = [connect(rendezvous, rank)[0] for rank in range(1, ranks + 1)]
print(len(lines), "ranks")
"""
)


def limited(program: str, soft: int, hard: int, ranks: int) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", program, *map(str, (soft, hard, ranks))]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=60, env=os.environ | {"PYTHONPATH": str(ROOT)}
    )


def test_a_low_soft_limit_is_raised_as_far_as_needed() -> None:
    # the ranks' ends of the connections are in the same process, and count too
    done = limited(CONNECT, 64, 4096, RANKS)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split("\n")[:2] == [f"{RANKS + 64 + 256} 4096", f"{RANKS} ranks"]


def test_a_limit_that_suffices_is_left_alone() -> None:
    assert limited(PREPARE, 2048, 4096, RANKS).stdout == "2048 4096\n"


def test_a_hard_limit_that_is_too_low_is_reported_with_the_cure() -> None:
    done = limited(PREPARE, 128, 300, RANKS)
    assert done.returncode == 64, done.stderr
    assert done.stdout.startswith("rank 0 may have 300 files open\n")
    assert f"ulimit -n {RANKS + 64 + 256}" in done.stdout
