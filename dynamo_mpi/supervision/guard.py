# SPDX-License-Identifier: Apache-2.0
"""Rank 0's guard: the one place from which a world is ended that can't end by itself, from any thread, with one report."""

from __future__ import annotations

import contextlib
import faulthandler
import os
import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING

from dynamo_mpi.errors import DeadlineError
from dynamo_mpi.preflight.roster import describe_ranks
from dynamo_mpi.supervision.stacks import describe_stacks
from dynamo_mpi.supervision.watch import Failure, Watch, describe_error

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from dynamo_mpi.preflight.roster import Placed
    from dynamo_mpi.supervision.phases import Phases
    from dynamo_mpi.talk import Voice
    from dynamo_mpi.world import World


_BACKSTOP_SECONDS = 15.0


class Guard:
    """Watches over all ranks while they load, and ends them together.

    Args:
        world: all ranks. Building the guard is collective: the others build a `Watched`.
        ranks: where each rank is.
        phases: name the phase in which it happened.
        voice: writes the report.
    """

    def __init__(self, world: World, ranks: Sequence[Placed], phases: Phases, voice: Voice) -> None:
        self._world, self._ranks, self._phases, self._voice = world, ranks, phases, voice
        self._ending = threading.Lock()
        self._cleanups: list[Callable[[], None]] = []
        self.failed = threading.Event()
        self._watch = Watch(world.duplicate(), self._rank_failed)
        self._watch.start()

    def name(self, ranks: Sequence[int]) -> str:
        """Name ranks with their hosts."""
        return describe_ranks(ranks, self._ranks)

    def before_the_end(self, cleanup: Callable[[], None]) -> None:
        """Call this before the world is ended, after the report. It has to be quick."""
        self._cleanups.append(cleanup)

    def end(self, error: BaseException, code: int | None = None) -> None:
        """End all ranks because of ``error``; only the first one counts. Does not return.

        Args:
            error: what to report, of rank 0.
            code: what to leave with, where it isn't the error's own.
        """
        text, own_code = describe_error(error)
        self._end(Failure(0, own_code if code is None else code, text))

    @contextmanager
    def deadline(self, seconds: float, what: str, flag: str) -> Iterator[None]:
        """End the world, with a word of where each rank stands, when the body takes longer.

        Args:
            seconds: for the body.
            what: what is late.
            flag: gives it longer.
        """
        timer = threading.Timer(seconds, self._late, (seconds, what, flag))
        timer.daemon, timer.name = True, "watch"
        timer.start()
        # no thread of Python's runs while native code holds the interpreter, as an import that starts MPI may
        faulthandler.dump_traceback_later(seconds + _BACKSTOP_SECONDS, exit=True)
        try:
            yield
        finally:
            timer.cancel()
            # one that has begun ends the world
            timer.join()
            faulthandler.cancel_dump_traceback_later()

    def close(self) -> None:
        """Stop watching, here and on the other ranks."""
        self._watch.close()

    def _late(self, seconds: float, what: str, flag: str) -> None:
        places = "unknown"
        with contextlib.suppress(Exception):  # whatever hinders it, the deadline has passed
            stacks = self._watch.stacks()
            silent = [rank for rank in range(self._world.size) if rank not in stacks]
            places = describe_stacks(stacks, silent, self.name)
        error = DeadlineError(
            f"{what} after {seconds:g} s",
            needed="all ranks to come through",
            fix=f"look at the ranks that stand apart from the others; {flag} gives it longer",
        )
        self._end(Failure(0, int(error.exit_code), f"{error}\nwhere the ranks are:\n{places}"))

    def _rank_failed(self, failure: Failure) -> None:
        self._end(failure)

    def _end(self, failure: Failure) -> None:
        self.failed.set()
        # never released: who comes second waits here for the end
        self._ending.acquire()
        # a reader of our words that hangs, or an MPI that can't end its ranks, is no reason to stay
        backstop = threading.Timer(_BACKSTOP_SECONDS, os._exit, (failure.exit_code,))
        backstop.daemon = True
        backstop.start()
        where = "" if failure.rank == 0 else f"{self.name([failure.rank])}: "
        self._voice.say(f"error in {self._phases.current}: {where}{failure.text}")
        for cleanup in self._cleanups:
            # whatever it raises, the world has to end
            with contextlib.suppress(Exception):
                cleanup()
        self._world.abort(failure.exit_code)
