# SPDX-License-Identifier: Apache-2.0
"""What it costs rank 0 to watch over hundreds of ranks, and how soon it knows of a death.

    python tests/bench/liveness.py [--ranks 512] [--seconds 20] [--deaths 50]

The other ranks are connections of one more process, which speaks the real protocol at the real pace; rank 0 is a process with the real
server. The baselines, in the same run and with the same ranks, are what one writes first: a thread for each connection, which reads it with
a time limit, and one thread that asks all connections in turn, every 50 ms. Printed are the time until all ranks are let in, messages and CPU
while nothing happens, and the time from a connection's end to the report.
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
import threading
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from dynamo_mpi.common.process import raise_nofile_limit
from dynamo_mpi.supervisor.frame_connection import ClosedError, FrameConnection
from dynamo_mpi.supervisor.heartbeat_protocol import (
    NONCE_BYTES,
    TOKEN_BYTES,
    Frame,
    FrameDecoder,
    FrameType,
    Join,
    leader_mac,
)
from dynamo_mpi.supervisor.heartbeat_server import HeartbeatServer, RankEvents
from dynamo_mpi.supervisor.join import MAX_PENDING, connect
from dynamo_mpi.supervisor.rendezvous import Rendezvous

Watch = Callable[[socket.socket, Rendezvous, int, "queue.SimpleQueue[float]"], object]
_CONNECTORS = 32
_TIMEOUT_SECONDS = 60.0
_POLL_SECONDS = 0.05


class Figures(NamedTuple):
    """What one run has shown."""

    admitted: float
    cpu: float
    messages: float
    deaths: list[float]


def main() -> int:
    """Run the comparison and print it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=512)
    parser.add_argument("--seconds", type=float, default=20.0, help="for which CPU and messages are counted")
    parser.add_argument("--deaths", type=int, default=50)
    arguments = parser.parse_args()
    found = {
        name: run(watch, arguments.ranks, arguments.seconds, arguments.deaths)
        for name, watch in (("ours", watch_by_server), ("threads", watch_by_threads), ("polling", watch_by_polling))
    }
    ours = found["ours"]
    print(f"{arguments.ranks} ranks, {ours.messages:.0f} messages a second, as by default")
    for name, theirs in found.items():
        print(f"{name}:")
        print(f"  all let in after {theirs.admitted:.2f} s{ratio(ours.admitted, theirs.admitted)}")
        print(f"  rank 0's CPU, of one core: {theirs.cpu:.2%}{ratio(ours.cpu, theirs.cpu)}")
        for word, of in (("median", statistics.median), ("longest", max)):
            mine, other = of(ours.deaths), of(theirs.deaths)
            print(
                f"  a death is known after {other * 1000:.2f} ms, the {word} of {len(theirs.deaths)}{ratio(mine, other)}"
            )
    return 0


def ratio(ours: float, theirs: float) -> str:
    """Say how ours compares to a baseline; nothing to itself."""
    return "" if ours == theirs else f"; ours / this: {ours / theirs:.2f}"


def run(watch: Watch, ranks: int, seconds: float, deaths: int) -> Figures:
    """Watch over the ranks of another process in one of these ways."""
    listener, rendezvous, ours, others = start_ranks(ranks)
    ends: queue.SimpleQueue[float] = queue.SimpleQueue()
    watcher = watch(listener, rendezvous, ranks, ends)
    begin = time.monotonic()
    ours.send("come")
    ours.recv()
    admitted = time.monotonic() - begin
    cpu, sent = time.process_time(), ours_count(ours)
    time.sleep(seconds)
    cpu, sent = time.process_time() - cpu, ours_count(ours) - sent
    known = []
    for _ in range(deaths):
        ours.send("die")
        # both clocks are the machine's
        known.append(-ours.recv() + ends.get(timeout=_TIMEOUT_SECONDS))
    ours.send("end")
    others.join()
    if isinstance(watcher, HeartbeatServer):
        watcher.close()
    return Figures(admitted, cpu / seconds, sent / seconds, known)


def start_ranks(ranks: int) -> tuple[socket.socket, Rendezvous, Connection, BaseProcess]:
    """Start all ranks but 0 in one process; return rank 0's listener and its rendezvous, the pipe to that process, and the process."""
    raise_nofile_limit(2 * (ranks + MAX_PENDING))
    listener = socket.create_server(("127.0.0.1", 0), backlog=max(128, ranks))
    rendezvous = Rendezvous("here", "127.0.0.1", listener.getsockname()[1], secrets.token_hex(TOKEN_BYTES))
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    others = context.Process(target=be_ranks, args=(rendezvous, ranks, theirs), daemon=True)
    others.start()
    ours.recv()  # it runs
    return listener, rendezvous, ours, others


def ours_count(ours: Connection) -> int:
    """Ask how many messages the ranks have sent."""
    ours.send("count")
    count: int = ours.recv()
    return count


def watch_by_server(
    listener: socket.socket, rendezvous: Rendezvous, ranks: int, ends: queue.SimpleQueue[float]
) -> HeartbeatServer:
    """Watch as rank 0 does."""
    server = HeartbeatServer(
        ranks + 1,
        rendezvous,
        listener,
        lambda: "serve",
        str,
        RankEvents(lambda failure: ends.put(failure.at), lambda *_: None),
    )
    server.start()
    return server


def watch_by_polling(
    listener: socket.socket, rendezvous: Rendezvous, ranks: int, ends: queue.SimpleQueue[float]
) -> None:
    """Watch by asking every connection in turn, as one would ask MPI."""
    token = bytes.fromhex(rendezvous.token)
    listener.setblocking(False)

    def poll() -> None:
        lines: dict[int, FrameConnection] = {}
        beat = time.monotonic()
        while True:
            with contextlib.suppress(BlockingIOError):
                while True:
                    line = FrameConnection(listener.accept()[0])
                    lines[line.fileno()] = line
                    line.send(Frame(FrameType.HELLO, secrets.token_bytes(NONCE_BYTES)))
                    line.allow_frames(1 << 16)
            for number, line in list(lines.items()):
                try:
                    frames = line.read()
                except ClosedError:
                    ends.put(time.monotonic())
                    del lines[number]
                    continue
                for frame in frames:
                    if frame.kind is FrameType.JOIN:
                        join = Join.unpack(frame.body)
                        line.send(Frame(FrameType.WELCOME, leader_mac(token, join.nonce, join.rank)))
            if time.monotonic() - beat > rendezvous.heartbeat_interval:
                beat = time.monotonic()
                for line in lines.values():
                    line.send(Frame(FrameType.HEARTBEAT))
            time.sleep(_POLL_SECONDS)

    threading.Thread(target=poll, daemon=True).start()


def watch_by_threads(
    listener: socket.socket, rendezvous: Rendezvous, ranks: int, ends: queue.SimpleQueue[float]
) -> None:
    """Watch by a thread for each connection."""

    def serve(connection: socket.socket) -> None:
        token, nonce = bytes.fromhex(rendezvous.token), secrets.token_bytes(NONCE_BYTES)
        connection.sendall(Frame(FrameType.HELLO, nonce).pack())
        inbox = FrameDecoder()
        inbox.max_body = 1 << 16
        connection.settimeout(rendezvous.heartbeat_interval)
        heard = beat = time.monotonic()
        while True:
            with contextlib.suppress(TimeoutError):
                data = connection.recv(1 << 16)
                if not data:
                    ends.put(time.monotonic())
                    return
                heard = time.monotonic()
                for frame in inbox.feed(data):
                    if frame.kind is FrameType.JOIN:
                        join = Join.unpack(frame.body)
                        connection.sendall(Frame(FrameType.WELCOME, leader_mac(token, join.nonce, join.rank)).pack())
            now = time.monotonic()
            if now - heard > (rendezvous.heartbeat_timeout_for("serve") or now):
                ends.put(now)
                return
            if now - beat > rendezvous.heartbeat_interval:
                connection.sendall(Frame(FrameType.HEARTBEAT).pack())
                beat = now

    def accept() -> None:
        for _ in range(ranks):
            connection, _ = listener.accept()
            threading.Thread(target=serve, args=(connection,), daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()


def be_ranks(rendezvous: Rendezvous, ranks: int, orders: Connection) -> None:
    """Be all ranks but 0: connect as they do, send heartbeats at their pace, and die on request."""
    raise_nofile_limit(ranks)
    orders.send("here")
    orders.recv()
    lines: queue.SimpleQueue[FrameConnection] = queue.SimpleQueue()
    todo: queue.SimpleQueue[int] = queue.SimpleQueue()
    for rank in range(1, ranks + 1):
        todo.put(rank)

    def come() -> None:
        with contextlib.suppress(queue.Empty):
            while True:
                lines.put(connect(rendezvous, todo.get_nowait())[0])

    connectors = [threading.Thread(target=come) for _ in range(_CONNECTORS)]
    for thread in connectors:
        thread.start()
    for thread in connectors:
        thread.join()
    orders.send("all there")
    live(rendezvous, [lines.get() for _ in range(ranks)], orders)


def live(rendezvous: Rendezvous, lines: list[FrameConnection], orders: Connection) -> None:
    """Send each line's heartbeats, spread over their period, and handle orders."""
    selector = selectors.DefaultSelector()
    selector.register(orders, selectors.EVENT_READ)
    for line in lines:
        selector.register(line, selectors.EVENT_READ, line)
    pace = rendezvous.heartbeat_interval / 2  # as `HeartbeatClient` does
    sent, turn, begin = 0, 0, time.monotonic()
    while True:
        due = begin + turn * pace / len(lines)
        for key, _ in selector.select(max(0.0, due - time.monotonic())):
            if key.data is not None:
                key.data.read()
                continue
            order = orders.recv()
            if order == "count":
                orders.send(sent)
            elif order == "die":
                line = lines.pop()
                selector.unregister(line)
                now = time.monotonic()
                line.close()
                orders.send(now)
            else:
                return
        if time.monotonic() >= due:
            lines[turn % len(lines)].send(Frame(FrameType.HEARTBEAT))
            sent, turn = sent + 1, turn + 1


if __name__ == "__main__":
    sys.exit(main())
