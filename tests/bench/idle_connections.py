# SPDX-License-Identifier: Apache-2.0
"""What idle connections of clients without credentials cost a world that starts: the time until all ranks are connected to rank 0.

    python tests/bench/idle_connections.py [--ranks 64] [--connections 2000] [--runs 5]

Rank 0 is a process with the real server, the ranks are connections of another process that speaks the real protocol. A third process holds as
many idle connections as it can, from the ranks' own address, and opens each again that the server closes. Runs with and without it alternate;
the figure to look at is the median ratio.
"""

from __future__ import annotations

import argparse
import contextlib
import multiprocessing
import queue
import secrets
import selectors
import socket
import statistics
import sys
import time
from multiprocessing.connection import Connection
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from dynamo_mpi.common.process import raise_nofile_limit
from dynamo_mpi.supervisor.heartbeat_protocol import TOKEN_BYTES
from dynamo_mpi.supervisor.heartbeat_server import HeartbeatServer
from dynamo_mpi.supervisor.join import MAX_PENDING
from dynamo_mpi.supervisor.rendezvous import Rendezvous
from tests.bench.liveness import be_ranks, watch_by_lookout

_REOPENED_PER_SECOND = 200


def main() -> int:
    """Run the comparison and print it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=64)
    parser.add_argument("--connections", type=int, default=2000)
    parser.add_argument("--runs", type=int, default=5)
    arguments = parser.parse_args()
    pairs = [
        (seconds_to_connect(arguments.ranks, arguments.connections), seconds_to_connect(arguments.ranks, 0))
        for _ in range(arguments.runs)
    ]
    ratios = sorted(crowded / alone for crowded, alone in pairs)
    crowded, alone = (statistics.median(column) for column in zip(*pairs, strict=True))
    print(
        f"{arguments.ranks} ranks connected to rank 0: beside {arguments.connections} idle connections {crowded * 1000:.0f} ms, "
        f"alone {alone * 1000:.0f} ms; ratio {statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f}, {len(pairs)} pairs)"
    )
    return 0


def seconds_to_connect(ranks: int, connections: int) -> float:
    """Return how long it takes until all ranks are connected, beside idle connections."""
    raise_nofile_limit(2 * (ranks + MAX_PENDING))
    listener = socket.create_server(("127.0.0.1", 0), backlog=max(128, ranks))
    rendezvous = Rendezvous("here", "127.0.0.1", listener.getsockname()[1], secrets.token_hex(TOKEN_BYTES))
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    others = context.Process(target=be_ranks, args=(rendezvous, ranks, theirs), daemon=True)
    others.start()
    ours.recv()
    server = watch_by_lookout(listener, rendezvous, ranks, queue.SimpleQueue())
    assert isinstance(server, HeartbeatServer)
    crowd, crowds_end = context.Pipe()
    strangers = context.Process(target=hold, args=(rendezvous.port, connections, crowds_end), daemon=True)
    strangers.start()
    crowd.recv()
    begin = time.monotonic()
    ours.send("come")
    ours.recv()
    taken = time.monotonic() - begin
    strangers.kill()
    strangers.join()
    ours.send("end")
    others.join()
    server.close()
    return taken


def hold(port: int, connections: int, orders: Connection) -> None:
    """Hold idle connections, and open again what the server closes."""
    raise_nofile_limit(connections)
    selector = selectors.DefaultSelector()

    def open_one() -> None:
        connection = socket.create_connection(("127.0.0.1", port), timeout=5)
        connection.setblocking(False)
        selector.register(connection, selectors.EVENT_READ)

    for _ in range(connections):
        open_one()
    orders.send("here")
    while True:
        for key, _ in selector.select():
            connection = key.fileobj
            assert isinstance(connection, socket.socket)
            with contextlib.suppress(BlockingIOError):
                try:
                    ended = not connection.recv(4096)
                except ConnectionError:
                    ended = True
                if ended:
                    selector.unregister(connection)
                    connection.close()
                    time.sleep(1 / _REOPENED_PER_SECOND)
                    with contextlib.suppress(OSError):  # all ranks are connected: the listener is closed
                        open_one()


if __name__ == "__main__":
    sys.exit(main())
