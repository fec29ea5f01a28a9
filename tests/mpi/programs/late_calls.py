# SPDX-License-Identifier: Apache-2.0
"""Let all ranks but the last call each other; then all, the last one a round further. Each says whom it does not hear. What nobody heard
stays behind, and MPI ends well."""

from __future__ import annotations

import time

from mpi4py import MPI

from dynamo_mpi.checks.mpi_fabric import PeerPings

SECONDS = 20.0
_FIRST, _SECOND, _THIRD = 100, 101, 102


def main() -> None:
    world = MPI.COMM_WORLD
    last = world.Get_size() - 1
    peers = [rank for rank in range(last + 1) if rank != world.Get_rank()]
    unheard: list[tuple[int, ...]] = []
    if world.Get_rank() != last:
        first = PeerPings(world, peers, _FIRST)
        unheard.append(_heard_but(first, (last,)))
        first.end()
    world.Barrier()
    # those of the first round are there by now, and nobody takes them for new; the last rank is a round further
    is_last = world.Get_rank() == last
    second = PeerPings(world, peers, _THIRD if is_last else _SECOND, (_SECOND,) if is_last else ())
    unheard.append(_heard_but(second, tuple(peers) if is_last else ()))
    second.end()
    told = world.gather(unheard)
    if told is not None:
        print(told)


def _heard_but(calls: PeerPings, expected: tuple[int, ...]) -> tuple[int, ...]:
    """Wait until nobody else is missing."""
    end = time.monotonic() + SECONDS
    while calls.unheard() != expected and time.monotonic() < end:
        time.sleep(0.001)
    return calls.unheard()


if __name__ == "__main__":
    main()
