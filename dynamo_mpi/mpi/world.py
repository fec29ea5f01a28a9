# SPDX-License-Identifier: Apache-2.0
"""The MPI world: all ranks of this worker, and the few collectives that the bootstrap needs.

Every operation is one or two MPI calls, whatever the size. Payloads are bytes: received data is never unpickled. Waiting ranks sleep between
polls; a blocking MPI call would use a core while it waits.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import time

from dynamo_mpi.common.errors import LaunchError
from dynamo_mpi.common.light_typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

    from mpi4py import MPI

_HEAD = 1024
_SPIN_SECONDS = 0.001
_LONGEST_SLEEP_SECONDS = 0.005
# the request to end all ranks is sent at once, but Open MPI 4.1, if it is already ending them, would block for 3 s
_ABORT_SECONDS = 0.5
# Open MPI's own error handler ends all ranks at once where a peer's connection closes, before anyone could report who it was
_FATAL_ERROR_DELAY_SECONDS = 1


class World:
    """A duplicate of ``COMM_WORLD`` for the bootstrap's collectives. Create it with `init_mpi`."""

    def __init__(self, comm: MPI.Intracomm) -> None:
        self.comm = comm
        self.rank: int = comm.Get_rank()
        self.size: int = comm.Get_size()

    def broadcast(self, payload: bytes = b"") -> bytes:
        """Send rank 0's ``payload`` to every rank. Collective."""
        # its length, and as much of it as fits: one message, where the payload is short
        head = bytearray(len(payload).to_bytes(8, "little") + payload[:_HEAD].ljust(_HEAD, b"\0"))
        _wait(self.comm.Ibcast(head, 0))
        length = int.from_bytes(head[:8], "little")
        if length <= _HEAD:
            return bytes(head[8 : 8 + length])
        rest = bytearray(payload[_HEAD:] if self.rank == 0 else length - _HEAD)
        _wait(self.comm.Ibcast(rest, 0))
        return bytes(head[8:] + rest)

    def gather(self, payload: bytes) -> list[bytes]:
        """Gather every rank's ``payload`` on rank 0, in rank order; other ranks get an empty list. Collective."""
        lengths = bytearray(8 * self.size)
        _wait(self.comm.Igather(bytearray(len(payload).to_bytes(8, "little")), lengths, 0))
        if self.rank:
            _wait(self.comm.Igatherv(payload, None, 0))
            return []
        counts = [int.from_bytes(lengths[8 * i : 8 * i + 8], "little") for i in range(self.size)]
        offsets = [sum(counts[:i]) for i in range(self.size)]
        data = bytearray(sum(counts))
        _wait(self.comm.Igatherv(payload, [data, counts, offsets, _byte_type()], 0))
        return [bytes(data[o : o + n]) for o, n in zip(offsets, counts, strict=True)]

    def barrier(self, seconds: float) -> bool:
        """Wait until every rank has reached the barrier, at most ``seconds``; return whether all have. Collective."""
        return _wait(self.comm.Ibarrier(), seconds)

    def duplicate(self) -> MPI.Intracomm:
        """Return a communicator of the same ranks for another module's messages. Collective."""
        return self.comm.Dup()

    def abort(self, code: int) -> None:
        """End all ranks with exit code ``code``, if the launcher passes it on. Does not return."""
        from dynamo_mpi.common.process import hard_exit_after

        # exit even if MPI can't end the ranks
        hard_exit_after(_ABORT_SECONDS, code)
        _change_fatal_error_delay(_FATAL_ERROR_DELAY_SECONDS, 0)
        if (
            self.size > 1
        ):  # of one rank, Open MPI would print what it knows of MPI_Abort, or that it doesn't find its own text
            self.comm.Abort(code)
        # it returns if Open MPI's own error handler is ending the ranks, too
        os._exit(code)


def load_mpi_library() -> str:
    """Import mpi4py without starting MPI, and return its library's version string.

    Raises:
        LaunchError: mpi4py is missing, or finds no MPI library.
    """
    try:
        import mpi4py

        # TensorRT-LLM sets it at import, which is after MPI_Init here
        os.environ.setdefault("OMPI_MCA_coll_ucc_enable", "0")
        # this module starts MPI itself, after the launch has been checked
        mpi4py.rc.initialize = False
        mpi4py.rc.finalize = True
        from mpi4py import MPI

        return MPI.Get_library_version()
    except (ImportError, RuntimeError, OSError) as error:
        raise LaunchError(
            f"mpi4py can't be used: {' '.join(str(error).split())}",
            expected="mpi4py and the MPI library of the launcher",
            fix="pip install mpi4py, and load the MPI module (or set MPI4PY_LIBMPI=/path/to/libmpi.so)",
        ) from None


_SHARED_MEMORY_PER_RANK = 32 << 20  # twice what Open MPI 4 and 5 take


def _has_shared_memory(ranks: int) -> bool:
    """Return whether /dev/shm has room for the ranks of this node: where it hasn't, Open MPI needs TCP between them."""
    try:
        room = os.statvfs("/dev/shm")  # noqa: S108 - nothing is written
    except OSError:
        return False
    return room.f_bavail * room.f_frsize >= ranks * _SHARED_MEMORY_PER_RANK


def init_mpi(*, alone: bool = False, size: int = 0, local_size: int | None = None) -> World:
    """Start MPI and return the world. Collective; call it only once.

    Args:
        alone: whether no launcher has started this rank.
        size: number of ranks according to the launcher; 0 if it isn't known.
        local_size: number of those on this node; None if it isn't known.

    Raises:
        LaunchError: the MPI library doesn't support MPI_THREAD_MULTIPLE, which the engines need.
    """
    from mpi4py import MPI

    if local_size is not None and local_size == size and _has_shared_memory(size):
        # Open MPI listens at all addresses for TCP, whatever its parameters, and no rank of this world needs it
        os.environ.setdefault("OMPI_MCA_btl", "^tcp" if size > 1 else "self")
    if not os.environ.get("HOME"):
        from dynamo_mpi.common.process import home_variable

        os.environ.update(home_variable(os.environ))
    if alone:
        # without a launcher, Open MPI's shared memory for local ranks would remain: 16 MiB of /dev/shm per start
        os.environ.setdefault("OMPI_MCA_btl", "self")
    elif local_size == 1:
        # likewise with Open MPI 5 if the launcher kills the rank
        os.environ.setdefault("OMPI_MCA_btl", "^sm")
    elif local_size is not None and local_size > (os.cpu_count() or local_size):
        # Open MPI's ranks poll while they wait; each would keep others from computing until the system's scheduler interrupts it
        os.environ.setdefault("OMPI_MCA_mpi_yield_when_idle", "1")
    if not MPI.Is_initialized():
        with _own_session_folder() if alone else contextlib.nullcontext():
            start_mpi()
    if MPI.Query_thread() < MPI.THREAD_MULTIPLE:
        raise LaunchError(
            "the MPI library grants less than MPI_THREAD_MULTIPLE",
            expected="an MPI built with thread support: the engine uses MPI from a thread of its own",
            fix="use an Open MPI or MPICH built with --enable-mpi-threads / --enable-threads=multiple",
        )
    return World(MPI.COMM_WORLD.Dup())


@contextlib.contextmanager
def _own_session_folder() -> Iterator[None]:
    """Give Open MPI a temporary folder of its own while it starts, and remove it: without a launcher it leaves an ``ompi.HOST.UID`` there,
    with one more empty folder for each start (Open MPI 5.0.11), and uses it for shared memory alone, which such a rank doesn't have."""
    usual = os.environ.get("TMPDIR")
    # where Open MPI looks, in its order
    parent = next(filter(None, map(os.environ.get, ("TMPDIR", "TEMP", "TMP"))), "/tmp")  # noqa: S108 - mkdir refuses what exists
    folder = os.path.join(parent, f"dynamo-mpi-start-{os.getpid()}")
    try:
        os.mkdir(folder, 0o700)
    except OSError:
        yield
        return
    os.environ["TMPDIR"] = folder
    try:
        yield
    finally:
        if usual is None:
            del os.environ["TMPDIR"]
        else:
            os.environ["TMPDIR"] = usual
        for below, folders, files in os.walk(folder, topdown=False):
            with contextlib.suppress(OSError):
                for name in files:
                    os.unlink(os.path.join(below, name))
                for name in folders:
                    os.rmdir(os.path.join(below, name))
        with contextlib.suppress(OSError):
            os.rmdir(folder)


def start_mpi() -> None:
    """Start MPI with the GIL released, unlike mpi4py: MPI_Init waits for every rank, and this rank must be able to exit meanwhile."""
    import ctypes

    from mpi4py import MPI

    try:
        # mpi4py's extension module is linked against the MPI library, so its symbols are found through it
        start = ctypes.CDLL(MPI.__file__).MPI_Init_thread
    except (OSError, AttributeError):
        MPI.Init_thread(MPI.THREAD_MULTIPLE)
        return
    if start(None, None, MPI.THREAD_MULTIPLE, ctypes.byref(ctypes.c_int())) != MPI.SUCCESS:
        raise LaunchError(
            "MPI could not be started",
            expected="a launcher that goes with the MPI library",
            fix="see the library's messages above; docs/tested.md lists the tested combinations",
        )
    _change_fatal_error_delay(0, _FATAL_ERROR_DELAY_SECONDS)
    # mpi4py does this when it starts MPI itself
    for communicator in (MPI.COMM_WORLD, MPI.COMM_SELF):
        communicator.Set_errhandler(MPI.ERRORS_RETURN)
    atexit.register(finalize_mpi)


def _change_fatal_error_delay(before: int, after: int) -> None:
    """Change how many seconds Open MPI waits before it ends all ranks, unless the user has set it; other libraries don't have it.

    Whatever ends them: a communicator's error handler doesn't see that a peer's connection has closed, see
    ``findings/openmpi-tcp-ignores-errors-return.sh``.
    """
    import ctypes

    from mpi4py import MPI

    if "OMPI_MCA_mpi_abort_delay" in os.environ:
        return
    with contextlib.suppress(OSError, ValueError):
        delay = ctypes.c_int.in_dll(ctypes.CDLL(MPI.__file__), "opal_abort_delay")
        if delay.value == before:
            delay.value = after


def finalize_mpi() -> None:
    """Finalize MPI if it was started. Waits for the other ranks; idempotent."""
    from mpi4py import MPI

    if MPI.Is_initialized() and not MPI.Is_finalized():
        MPI.Finalize()


def _byte_type() -> MPI.Datatype:
    from mpi4py import MPI

    return MPI.BYTE


def _wait(request: MPI.Request, seconds: float = float("inf")) -> bool:
    """Wait until a request is complete, at most ``seconds``; return whether it is."""
    start = time.monotonic()
    pause = 0.0
    while not request.Test():
        waited = time.monotonic() - start
        if waited > seconds:
            return False
        if waited > _SPIN_SECONDS:
            pause = min(pause + 0.0002, _LONGEST_SLEEP_SECONDS)
        time.sleep(pause)
    return True
