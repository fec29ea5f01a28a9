# SPDX-License-Identifier: Apache-2.0
"""Broadcast and gather payloads of many sizes; every rank checks what it gets. Rank 0 prints the number of checks."""

from __future__ import annotations

import sys
from collections.abc import Callable

from dynamo_mpi.mpi.world import World, init_mpi, load_mpi_library

MEGABYTE = 1 << 20


def payload(rank: int, size: int) -> bytes:
    """Bytes that identify their rank and their place."""
    return bytes((rank * 37 + place) % 251 for place in range(min(size, 1000))).ljust(size, b"%d" % (rank % 10))


def check(world: World) -> int:
    checks = 0
    for size in (0, 1, 1000, MEGABYTE, 0):
        expected = payload(0, size)
        # what another rank passes is of no account
        got = world.broadcast(expected if world.rank == 0 else b"ignored")
        assert got == expected, (world.rank, "broadcast", size)
        checks += 1
    patterns: tuple[Callable[[int], int], ...] = (
        lambda rank: 0,
        lambda rank: 1,
        lambda rank: MEGABYTE,
        lambda rank: rank * 1000,
        lambda rank: 0 if rank == 0 else 3,
        lambda rank: 5 if rank == 0 else 0,
        lambda rank: MEGABYTE if rank == world.size - 1 else rank % 2,
    )
    for sizes in patterns:
        got_all = world.gather(payload(world.rank, sizes(world.rank)))
        expected_all = [payload(rank, sizes(rank)) for rank in range(world.size)] if world.rank == 0 else []
        assert got_all == expected_all, (world.rank, "gather")
        checks += 1
    # somebody else's messages don't meet ours
    other = world.duplicate()
    request = other.Ibarrier()
    assert world.broadcast(b"between") == b"between" or world.rank
    request.Wait()
    return checks + 1


def main() -> None:
    load_mpi_library()
    world = init_mpi()
    try:
        checks = check(world)
    except BaseException:
        sys.excepthook(*sys.exc_info())
        world.abort(1)  # or else the other ranks wait for this one
    if world.rank == 0:
        print(f"ranks {world.size} checks {checks}")


if __name__ == "__main__":
    main()
