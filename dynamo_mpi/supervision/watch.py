# SPDX-License-Identifier: Apache-2.0
"""While ranks load, and may be stuck in each other's collectives: failures reach rank 0 at once, and so does where each rank stands.

Every rank has a communicator and a thread for it. Neither takes part in what the rank's main thread does, so they also work while
that sits in a collective that will never end.
"""

from __future__ import annotations

import os
import threading
import time
import traceback
from typing import TYPE_CHECKING, NamedTuple

from dynamo_mpi.errors import BootstrapError
from dynamo_mpi.exit_codes import ExitCode
from dynamo_mpi.fields import pack, unpack
from dynamo_mpi.supervision.stacks import own_stacks

if TYPE_CHECKING:
    from collections.abc import Callable

    from mpi4py import MPI

_FAILED, _ASK, _STACKS = 1, 2, 3
_SHOW = b"S"
_PERIOD_SECONDS = 0.1
_STACKS_SECONDS = 2.0
_RESCUE_SECONDS = 10.0


class Failure(NamedTuple):
    """Why the world can't go on.

    Args:
        rank: where.
        exit_code: what every rank is to leave with.
        text: for the user.
    """

    rank: int
    exit_code: int
    text: str


def describe_error(error: BaseException) -> tuple[str, int]:
    """Return what to tell of an error, and the exit code: a traceback unless we know what it means."""
    if isinstance(error, BootstrapError):
        return str(error), int(error.exit_code)
    return "".join(traceback.format_exception(error)).rstrip(), int(ExitCode.ENGINE)


class Watch:
    """Rank 0's side.

    Args:
        comm: all ranks, for this alone.
        on_failure: called from the watch's thread with the first failure that another rank has told.
    """

    def __init__(self, comm: MPI.Intracomm, on_failure: Callable[[Failure], None]) -> None:
        self._comm = comm
        self._size: int = comm.Get_size()
        self._on_failure = on_failure
        self._end = threading.Event()
        self._sent: list[MPI.Request] = []
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stacks(self) -> dict[int, str]:
        """Ask every rank where it stands, and return what those have answered that could, within two seconds."""
        self._tell(_SHOW)
        answers = {0: own_stacks()}
        end = time.monotonic() + _STACKS_SECONDS
        while len(answers) < self._size and time.monotonic() < end:
            message = self._receive(_STACKS)
            if message is None:
                time.sleep(_PERIOD_SECONDS / 10)
            else:
                answers[message[0]] = message[1].decode("utf-8", "replace")
        return answers

    def close(self) -> None:
        """End the thread."""
        self._end.set()
        self._thread.join()

    def _tell(self, what: bytes) -> None:
        # kept: the data has to live until it has been sent, and a rank that hangs takes it never
        self._sent += [self._comm.Isend(what, rank, _ASK) for rank in range(1, self._size)]

    def _run(self) -> None:
        while not self._end.wait(_PERIOD_SECONDS):
            message = self._receive(_FAILED)
            if message is not None:
                code, text = unpack(message[1])
                self._on_failure(Failure(message[0], int(code), text))
                return

    def _receive(self, tag: int) -> tuple[int, bytes] | None:
        """Return the next message and who sent it, if one is there."""
        from mpi4py import MPI

        status = MPI.Status()
        message = self._comm.Improbe(MPI.ANY_SOURCE, tag, status)
        if message is None:
            return None
        data = bytearray(status.Get_count(MPI.BYTE))
        message.Recv(data)
        return status.Get_source(), bytes(data)


class Watched:
    """The side of every other rank.

    Args:
        comm: all ranks, for this alone.
    """

    def __init__(self, comm: MPI.Intracomm) -> None:
        self._comm = comm
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def close(self) -> None:
        """End the thread. MPI must not be finalised before."""
        self._end.set()
        self._thread.join()

    def fail(self, error: BaseException) -> None:
        """Tell rank 0 why this rank can't go on, and wait for the end of the world. Does not return."""
        text, code = describe_error(error)
        request = self._comm.Isend(pack([str(code), text]), 0, _FAILED)
        # rank 0 writes the report, and ends us with all the others
        end = time.monotonic() + _RESCUE_SECONDS
        while time.monotonic() < end:
            request.Test()
            time.sleep(_PERIOD_SECONDS)
        os.write(2, f"dynamo_mpi: rank {self._comm.Get_rank()}: rank 0 does not answer; {text}\n".encode())
        self._comm.Abort(code)

    def _run(self) -> None:
        answers: list[MPI.Request] = []
        while not self._end.wait(_PERIOD_SECONDS):
            # a test moves what is still on its way
            answers = [answer for answer in answers if not answer.Test()]
            if self._comm.Iprobe(0, _ASK):
                self._comm.Recv(bytearray(1), 0, _ASK)
                answers.append(self._comm.Isend(own_stacks().encode("utf-8", "replace"), 0, _STACKS))
