# SPDX-License-Identifier: Apache-2.0
"""Let all ranks but the last call each other; then all, the last one a round further. Each says whom it does not hear. What no rank received
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
    silent: list[tuple[int, ...]] = []
    if world.Get_rank() != last:
        first = PeerPings(world, peers, _FIRST)
        silent.append(_silent_at_last(first, (last,)))
        first.end()
    world.Barrier()
    # pings of the first round have arrived by now, and do not count for the second; the last rank is a round further
    is_last = world.Get_rank() == last
    second = PeerPings(world, peers, _THIRD if is_last else _SECOND, (_SECOND,) if is_last else ())
    silent.append(_silent_at_last(second, tuple(peers) if is_last else ()))
    second.end()
    gathered = world.gather(silent)
    if gathered is not None:
        print(gathered)


def _silent_at_last(pings: PeerPings, expected: tuple[int, ...]) -> tuple[int, ...]:
    """Wait until only these ranks are silent."""
    end = time.monotonic() + SECONDS
    while pings.silent_ranks() != expected and time.monotonic() < end:
        time.sleep(0.001)
    return pings.silent_ranks()


if __name__ == "__main__":
    main()
