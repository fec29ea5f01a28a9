# SPDX-License-Identifier: Apache-2.0
"""What idle connections of clients without credentials cost a world that starts: the time until all ranks are connected to rank 0; with
--world, of a real one, until it serves.

    python tests/bench/idle_connections.py [--ranks 64] [--connections 2000] [--runs 5] [--world]

Without --world, rank 0 is a process with the real server, the ranks are connections of another process that speaks the real protocol. A third
process holds as many idle connections as it can, from the ranks' own address, and opens each again that the server closes. With --world,
that is another user's process at every port of a worker (a small model, tp 8) and of its etcd, as soon as the port is open, but for
mpirun's own, which idle connections do hold up. Runs with and without it alternate; the figure to look at is the median ratio.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import os
import queue
import selectors
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from dynamo_mpi.common.ports import ANY_ADDRESS, LOOPBACK, listening_at
from dynamo_mpi.common.process import raise_nofile_limit
from dynamo_mpi.common.subprocess import session_members
from dynamo_mpi.engines.reference.convert_gguf import export_model, find_default_gguf
from dynamo_mpi.ops.listeners import kind_of
from dynamo_mpi.supervisor.heartbeat_server import HeartbeatServer
from tests.bench.liveness import start_ranks, watch_by_server
from tests.dynamo.running import EtcdServer, RunningWorker, system_port
from tests.tiny_llama import write_tiny_gguf
from tests.unit.neighbour import NOBODY

PROGRAM = Path(__file__).resolve().parents[1] / "dynamo/programs/strangers.py"

_REOPENED_PER_SECOND = 200


def main() -> int:
    """Run the comparison and print it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=64)
    parser.add_argument("--connections", type=int, default=2000)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--world", action="store_true", help="real ranks, a multiple of 8, and strangers at every port")
    arguments = parser.parse_args()
    with contextlib.ExitStack() as stack:
        measure = stack.enter_context(worlds()) if arguments.world else seconds_to_connect
        pairs = []
        for run in range(arguments.runs):
            # in turn, as the first one finds colder caches
            counts = (0, arguments.connections) if run % 2 == 0 else (arguments.connections, 0)
            seconds = {count: measure(arguments.ranks, count) for count in counts}
            pairs.append((seconds[arguments.connections], seconds[0]))
    ratios = sorted(crowded / alone for crowded, alone in pairs)
    crowded, alone = (statistics.median(column) for column in zip(*pairs, strict=True))
    reached, where = ("serve", " at every port") if arguments.world else ("connected to rank 0", "")
    print(
        f"{arguments.ranks} ranks {reached}: beside {arguments.connections} idle connections{where} {crowded * 1000:.0f} ms, "
        f"alone {alone * 1000:.0f} ms; ratio {statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f}, {len(pairs)} pairs)"
    )
    return 0


def seconds_to_connect(ranks: int, connections: int) -> float:
    """Return how long it takes until all ranks are connected, beside idle connections."""
    listener, rendezvous, ours, others = start_ranks(ranks)
    context = multiprocessing.get_context("spawn")
    server = watch_by_server(listener, rendezvous, ranks, queue.SimpleQueue())
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


@contextlib.contextmanager
def worlds() -> Iterator[Callable[[int, int], float]]:
    """Return a function like `seconds_to_connect` for real worlds."""
    with tempfile.TemporaryDirectory(prefix="idle-", ignore_cleanup_errors=True) as text:
        folder = Path(text)
        write_tiny_gguf(find_default_gguf(), folder / "tiny.gguf", layers=8, heads=8, kv_heads=8)
        export_model(folder / "tiny.gguf", folder / "model")
        etcd = EtcdServer(folder)
        etcd.start()
        try:
            yield partial(seconds_to_serve, folder, etcd)
        finally:
            etcd.stop()


def seconds_to_serve(folder: Path, etcd: EtcdServer, ranks: int, connections: int) -> float:
    """Return how long it takes from the start of mpirun until the worker serves, beside idle connections at every port."""
    own = Path(tempfile.mkdtemp(dir=folder))
    flags = ("--tensor-parallel-size", "8", "--pipeline-parallel-size", str(ranks // 8), "--load-timeout", "600")
    words = ["/usr/bin/python3", "-c", PROGRAM.read_text(), str(connections)]
    options: dict[str, int] = {"user": NOBODY, "group": NOBODY} if os.geteuid() == 0 else {}
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, **options) as strangers:  # type: ignore[call-overload]
        begin, places = time.monotonic(), set[tuple[str, int]]()
        worker = RunningWorker(own, etcd, folder / "model", ranks, *flags, DYN_SYSTEM_PORT=str(system_port()))
        try:
            while not worker.ready_file.exists():
                if worker.process.poll() is not None:
                    raise SystemExit(worker.text())
                time.sleep(0.1)
                pids = [*session_members(worker.process.pid), *([etcd.child.pid] if etcd.child else [])]
                found = {
                    place for pid in pids if kind_of(pid) not in ("mpirun", "mpiexec") for place in listening_at(pid)
                }
                new = {(LOOPBACK if address in ANY_ADDRESS else address, port) for address, port in found} - places
                places |= new
                if connections and new:
                    strangers.stdin.write(f"{json.dumps(sorted(new))}\n")
                    strangers.stdin.flush()
            return time.monotonic() - begin
        finally:
            worker.stop()
            out, _ = strangers.communicate()
            if connections:
                print(f"at {len(places)} ports: {out.strip()}", file=sys.stderr)


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
