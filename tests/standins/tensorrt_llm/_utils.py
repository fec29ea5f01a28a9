# SPDX-License-Identifier: Apache-2.0
"""MPI as the package sees it. Importing this starts MPI and is collective: all ranks of the world must do it."""

from __future__ import annotations

import atexit
import os

from mpi4py import MPI

_OMPI_COMM_TYPE_HOST = 9

if not MPI.Is_initialized() and os.environ.get("TRT_LLM_NO_LIB_INIT") != "1":
    MPI.Init_thread(MPI.THREAD_MULTIPLE)
    atexit.register(lambda: None if MPI.Is_finalized() else MPI.Finalize())
_comm: MPI.Intracomm = MPI.COMM_WORLD
# not made anew by set_mpi_comm, as in the real one
_host_comm = MPI.COMM_WORLD.Split_type(_OMPI_COMM_TYPE_HOST)


def set_mpi_comm(new_comm: MPI.Intracomm) -> None:
    """Replace the communicator that engines are built over; on all its ranks, before any is."""
    global _comm
    _comm = new_comm


def mpi_comm() -> MPI.Intracomm:
    """Return the communicator that engines are built over."""
    return _comm


def mpi_rank() -> int:
    """Return the rank in `mpi_comm`."""
    return int(mpi_comm().Get_rank())


def mpi_world_size() -> int:
    """Return the size of `mpi_comm`."""
    return int(mpi_comm().Get_size())


def mpi_barrier() -> None:
    """Wait for all ranks of `mpi_comm`."""
    mpi_comm().Barrier()


def global_mpi_rank() -> int:
    """Return the rank in COMM_WORLD."""
    return int(MPI.COMM_WORLD.Get_rank())


def global_mpi_size() -> int:
    """Return the size of COMM_WORLD."""
    return int(MPI.COMM_WORLD.Get_size())


def local_mpi_size() -> int:
    """Return how many ranks share this host."""
    return int(_host_comm.Get_size())
