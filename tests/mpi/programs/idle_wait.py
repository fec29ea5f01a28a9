# SPDX-License-Identifier: Apache-2.0
"""Ranks wait for a broadcast and a gather that come late; rank 0 prints how much CPU time each rank spent, as JSON.

Usage: ``idle_wait.py SECONDS``. Per rank: seconds waited, CPU seconds spent.
"""

from __future__ import annotations

import json
import sys
import time

from dynamo_mpi.mpi.world import init_mpi, load_mpi_library


def main() -> None:
    seconds = float(sys.argv[1])
    load_mpi_library()
    world = init_mpi()
    world.gather(world.broadcast())  # all are up
    start, spent = time.monotonic(), time.process_time()
    if world.rank == 0:
        # the lateness is what this program is about
        time.sleep(seconds)
    world.broadcast(b"late")
    if world.rank:
        own = [time.monotonic() - start, time.process_time() - spent]
        world.gather(json.dumps(own).encode())
    else:
        own = [seconds, 0.0]
        print(json.dumps([json.loads(part) for part in world.gather(json.dumps(own).encode())]))


if __name__ == "__main__":
    main()
