# SPDX-License-Identifier: Apache-2.0
"""A rank that does nothing but go through its phases: ``faulty_rank.py RANK SIZE WAIT``, with DYN_MPI_FAULT in the environment.

It stays in "serve" by WAIT: sleep, queue, asyncio or uvloop, or until an exception comes.
"""

from __future__ import annotations

import asyncio
import os
import queue
import sys
import threading
import time

from dynamo_mpi.common.errors import DynamoMpiError
from dynamo_mpi.common.log import RankLogger
from dynamo_mpi.common.phases import PhaseTracker
from dynamo_mpi.mpi.launcher import Launcher, LaunchInfo
from dynamo_mpi.supervisor.fault_injection import arm


def wait(how: str) -> None:
    if how == "sleep":
        time.sleep(20)
    elif how == "queue":
        queue.SimpleQueue[None]().get()


async def wait_in_a_loop(phases: PhaseTracker) -> None:
    with phases.enter("serve"):
        say("serve")
        await asyncio.wait([asyncio.ensure_future(asyncio.sleep(20))])


def say(word: str) -> None:
    """Print a line as a whole, whichever thread prints another."""
    os.write(1, f"{word}\n".encode())


def tick() -> None:
    """Say that threads run here."""
    while True:
        say("tick")
        time.sleep(0.02)


def main() -> int:
    rank, size, how = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
    phases = PhaseTracker()
    try:
        arm(os.environ, LaunchInfo(Launcher.OPEN_MPI, rank, size), phases, RankLogger(rank, "here"))
    except DynamoMpiError as error:
        print(error)
        return int(error.exit_code)
    threading.Thread(target=tick, daemon=True).start()
    for name in ("environment", "mpi_init", "preflight", "load"):
        with phases.enter(name):
            say(name)
    if how == "asyncio":
        asyncio.run(wait_in_a_loop(phases))
    elif how == "uvloop":
        import uvloop

        uvloop.run(wait_in_a_loop(phases))
    else:
        with phases.enter("serve"):
            say("serve")
            wait(how)
    with phases.enter("drain"):
        say("drain")
    return 0


if __name__ == "__main__":
    sys.exit(main())
