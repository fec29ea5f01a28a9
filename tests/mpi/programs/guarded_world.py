# SPDX-License-Identifier: Apache-2.0
"""A world under rank 0's guard. Arguments: what happens, and to which rank."""

from __future__ import annotations

import contextlib
import os
import resource
import signal
import socket
import sys
import threading
from pathlib import Path
from typing import NamedTuple

from dynamo_mpi.common.errors import DynamoMpiError
from dynamo_mpi.common.hooks import WorkerHook, WorkerHooks
from dynamo_mpi.common.log import RankLogger
from dynamo_mpi.common.phases import PhaseTracker
from dynamo_mpi.mpi.world import World, init_mpi, load_mpi_library
from dynamo_mpi.supervisor.heartbeat_client import HeartbeatClient
from dynamo_mpi.supervisor.rendezvous import Rendezvous, SupervisorConfig
from dynamo_mpi.supervisor.supervisor import WorldSupervisor
from tests.contexts import rank_context

KEPT: list[socket.socket] = []


class Placed(NamedTuple):
    """A rank of a host that everybody shares here."""

    host: str
    local_rank: int | None = None


def wait_for_what_never_comes() -> None:
    threading.Event().wait()


def meet(world: World) -> None:
    pass_the_barrier(world)


def pass_the_barrier(world: World) -> None:
    world.barrier(60)


def suffer(what: str) -> None:
    """Do to this rank what the test asks for."""
    if what == "hang":
        wait_for_what_never_comes()
    elif what == "stop":
        os.kill(os.getpid(), signal.SIGSTOP)
    elif what in ("kill", "kill_in_load"):
        os.kill(os.getpid(), signal.SIGKILL)
    elif what == "raise":
        raise ValueError("this rank has had enough")


def use_up_files() -> None:
    """Leave as many files as rank 0 may need, and none of them free."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (512, hard))
    with contextlib.suppress(OSError):
        while True:
            os.open(os.devnull, os.O_RDONLY)


def use_up_ports() -> None:
    """Leave this network namespace no port that the kernel may choose."""
    first, last = 40000, 40003
    Path("/proc/sys/net/ipv4/ip_local_port_range").write_text(f"{first} {last}")
    KEPT.extend(socket.create_server(("127.0.0.1", port)) for port in range(first, last + 1))


class CleanUp(WorkerHook):
    def on_exit(self, code: int) -> None:
        os.write(2, b"cleaned up\n")


def lead(world: World, what: str, victim: int) -> None:
    if what == "crowd":
        use_up_files()
    elif what == "ports":
        use_up_ports()
    phases = PhaseTracker()
    if what == "kill_in_load":
        phases.begin("preflight")
        phases.ahead = "load"
    network = os.environ.get("NETWORK", "127.0.0.1") or None
    hooks = WorkerHooks()
    hooks.add(CleanUp())
    terms = SupervisorConfig(network, float(os.environ.get("HEARTBEAT", "60")), os.environ.get("FAILURES", ""))
    try:
        guard = WorldSupervisor(
            rank_context(phases, world=world, host="here"), [Placed("here")] * world.size, terms, hooks
        )
    except DynamoMpiError as error:
        os.write(2, f"refused: {error}\n".encode())
        world.abort(error.exit_code)
    world.broadcast(guard.rendezvous.pack(b""))
    world.barrier(10)
    try:
        with guard.deadline(float(os.environ.get("TIMEOUT", "1")), "the barrier was not passed", "--timeout"):
            if victim == 0:
                suffer(what)
            meet(world)
    except ValueError as error:
        guard.abort(error)
    guard.close()


def follow(world: World, what: str, victim: int) -> None:
    rendezvous, _ = Rendezvous.unpack(world.broadcast())
    client = HeartbeatClient(rendezvous, world, PhaseTracker(), RankLogger(world.rank, "here"))
    world.barrier(10)
    try:
        if victim == world.rank:
            suffer(what)
        meet(world)
    except ValueError as error:
        client.report_failure(error)
    client.close()


def main() -> None:
    load_mpi_library()
    world = init_mpi()
    what, victim = sys.argv[1], int(sys.argv[2])
    (lead if world.rank == 0 else follow)(world, what, victim)


if __name__ == "__main__":
    main()
