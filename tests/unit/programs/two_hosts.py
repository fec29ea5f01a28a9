# SPDX-License-Identifier: Apache-2.0
"""Rank 0 and rank 1 on two hosts, network namespaces with a cable between them: what each sees of the other's end.

Arguments: the network (``4`` or ``6``), the heartbeat timeout, and what happens: ``cut`` the cable, or ``stop`` the process of rank 1.
Has to be started with network and mount namespaces of its own. Prints as JSON, for rank 0 and for rank 1 (where it can), what was seen and
after how many seconds.
"""

from __future__ import annotations

import json
import os
import queue
import secrets
import signal
import socket
import subprocess
import sys
import threading
import time

from dynamo_mpi.common.failure import Failure
from dynamo_mpi.common.host_address import host_address
from dynamo_mpi.supervisor.frame_connection import ClosedError
from dynamo_mpi.supervisor.heartbeat_protocol import TOKEN_BYTES, Frame, FrameType
from dynamo_mpi.supervisor.heartbeat_server import HeartbeatServer, RankEvents
from dynamo_mpi.supervisor.join import connect
from dynamo_mpi.supervisor.rendezvous import Rendezvous

NETWORKS = {"4": ("10.9.8.1/24", "10.9.8.2/24"), "6": ("fd00:9:8::1/64", "fd00:9:8::2/64")}


def build(network: str) -> None:
    """Make the other host and the cable."""
    near, far = NETWORKS[network]
    for words in (
        "mount -t tmpfs tmpfs /run",
        "ip link set lo up",
        "ip netns add far",
        "ip link add near type veth peer name eth0 netns far",
        f"ip address add {near} dev near nodad" if network == "6" else f"ip address add {near} dev near",
        "ip link set near up",
        f"ip -n far address add {far} dev eth0 nodad" if network == "6" else f"ip -n far address add {far} dev eth0",
        "ip -n far link set eth0 up",
    ):
        subprocess.run(words.split(), check=True)


def be_rank_0(network: str, timeout: float, what: str) -> None:
    build(network)
    address = host_address(NETWORKS[network][0], "the test's network")
    family = socket.AF_INET6 if network == "6" else socket.AF_INET
    listener = socket.create_server((address, 0), family=family)
    rendezvous = Rendezvous("near", address, listener.getsockname()[1], secrets.token_hex(TOKEN_BYTES), timeout)
    seen: queue.SimpleQueue[Failure] = queue.SimpleQueue()
    silences: list[tuple[int, float]] = []
    events = RankEvents(seen.put, lambda *_: None, on_silence=lambda *silence: silences.append(silence))
    server = HeartbeatServer(2, rendezvous, listener, lambda: "serve", lambda _: "far", events)
    server.start()
    words = ["ip", "netns", "exec", "far", sys.executable, __file__, "rank", rendezvous.pack(b"").hex()]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as rank:
        assert rank.stdout is not None
        assert rank.stdout.readline() == "connected\n"
        time.sleep(timeout or 1)  # heartbeats have gone back and forth
        assert seen.empty()
        begin = time.monotonic()
        if what == "cut":
            subprocess.run(["ip", "link", "set", "near", "down"], check=True)
        else:
            os.kill(rank.pid, signal.SIGSTOP)
        failure = seen.get(timeout=60)
        result = {"rank 0": [failure.cause.name, failure.exit_code, failure.text, failure.at - begin]}
        result["silences"] = list(silences)
        if what == "cut":
            kind, at = json.loads(rank.stdout.readline())
            result["rank 1"] = [kind, at - begin]
        print(json.dumps(result))
        rank.kill()


def be_rank_1(rendezvous: Rendezvous) -> None:
    line, _ = connect(rendezvous, 1)
    print("connected", flush=True)
    heard = time.monotonic()
    wake = threading.Event()
    while True:
        try:
            if line.read():
                heard = time.monotonic()
        except ClosedError as end:
            print(json.dumps(["lost" if end.lost else "closed", time.monotonic()]), flush=True)
            return
        if rendezvous.heartbeat_timeout and time.monotonic() - heard > rendezvous.heartbeat_timeout:
            print(json.dumps(["lost" if line.has_unacked_data else "silent", time.monotonic()]), flush=True)
            return
        line.send(Frame(FrameType.HEARTBEAT))
        wake.wait(rendezvous.heartbeat_interval / 2)


if __name__ == "__main__":
    if sys.argv[1] == "rank":
        be_rank_1(Rendezvous.unpack(bytes.fromhex(sys.argv[2]))[0])
    else:
        be_rank_0(sys.argv[1], float(sys.argv[2]), sys.argv[3])
