# SPDX-License-Identifier: Apache-2.0
"""Two ranks over TCP: rank 1 is killed while rank 0 waits for it in MPI. Rank 0 prints whether it still runs a moment after Open MPI's own
error handler has begun to end it, and ends all with 70."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time

from dynamo_mpi.mpi.world import World, init_mpi, load_mpi_library

SECONDS = 0.1


def report(world: World, reader: int) -> None:
    """Wait until the handler speaks: it says on stderr that it waits."""
    words = b""
    while b"before aborting" not in words:
        words += os.read(reader, 4096)
    # the time is what this program is about
    time.sleep(SECONDS)
    print("rank 0 still runs", flush=True)
    world.abort(70)


def main() -> None:
    load_mpi_library()
    world = init_mpi()
    if world.rank == 1:
        world.gather(world.broadcast())  # they are connected
        os.kill(os.getpid(), signal.SIGKILL)
    reader, writer = os.pipe()
    os.dup2(writer, 2)
    threading.Thread(target=report, args=(world, reader), daemon=True).start()
    world.gather(world.broadcast())
    world.comm.Recv(bytearray(8), source=1)
    sys.exit("rank 1 has sent something")


if __name__ == "__main__":
    main()
