# SPDX-License-Identifier: Apache-2.0
"""The fabric check over MPI, for worlds without GPUs. Only the creation of groups blocks in MPI: a waiting rank can report for which ranks it
waits.

A message that has been posted can't be cancelled, so rank 0 ends the world if the check hangs (`checks.run_hardware_checks`).
MPI does not report for which ranks a collective waits, so its members send each other pings: what blocks its messages blocks the pings too.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from dynamo_mpi.checks.fabric_steps import ALL_REDUCE, EXCHANGE, OK, FabricAnswer, Timing, segments
from dynamo_mpi.checks.hang_diagnosis import WaitState
from dynamo_mpi.common.fabric_payload import expected, expected_sum, outgoing
from dynamo_mpi.common.process import set_activity

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mpi4py import MPI

    from dynamo_mpi.checks.fabric_steps import Step
    from dynamo_mpi.mpi.world import World

_PING = b"\0"


class PeerPings:
    """One round of pings, to and from each of the other members. Each member starts it after it has waited for a while, independently of the
    others.

    Args:
        comm: the communicator in which the ranks are numbered.
        peers: the other members.
        tag: unique for this round, so that pings of earlier rounds don't count.
        earlier: tags of rounds in which this rank sent no pings; members that are still in such a round wait for them.
    """

    def __init__(self, comm: MPI.Comm, peers: Sequence[int], tag: int, earlier: Sequence[int] = ()) -> None:
        self._expected = {peer: comm.Irecv(bytearray(1), peer, tag) for peer in peers}
        self._sent = [comm.Isend(_PING, peer, one) for peer in peers for one in (*earlier, tag)]

    def silent_ranks(self) -> tuple[int, ...]:
        """Return the ranks whose ping has not arrived."""
        self._expected = {peer: request for peer, request in self._expected.items() if not request.Test()}
        return tuple(self._expected)

    def end(self) -> None:
        """Stop the round. Cancel the receives, since a member that did not wait long never sends a ping; MPI completes pings that no member
        receives."""
        for request in self._expected.values():
            request.Cancel()
            request.Wait()
        for request in self._sent:
            if not request.Test():
                request.Free()


# the best of several: another process may have used the core
_REPEATS = 8
# the share of the time that large messages may take together; a slow link is visible by then
_ENOUGH_SECONDS = 0.5
_TAG = 77
# each wait of a step has a tag for its pings: two sizes, ten operations each and as many agreements
_PING_TAG, _PINGS_PER_STEP = 100, 100
# in a collective that takes so long, members wait for others; a member whose ping doesn't arrive for as long again is reported
_PING_AFTER_SECONDS, _REPORT_AFTER_SECONDS = 0.5, 1.0
_SPIN_SECONDS = 0.002
_SLEEP_SECONDS = 0.001


def measure_over_mpi(world: World, steps: Sequence[Step], began: float) -> FabricAnswer:
    """Run this rank's part of all steps.

    Args:
        world: all ranks.
        steps: the same on all of them.
        began: start of the check, by `time.monotonic`.
    """
    from mpi4py import MPI

    begin = time.monotonic() - began
    timings: list[Timing] = []
    slowest: tuple[int | None, float] = (None, 0.0)
    comms: dict[str, MPI.Comm] = {}
    for step in steps:
        group = step.group_of(world.rank)
        if step.operation != EXCHANGE and step.kind not in comms:
            comms[step.kind] = _split(world, step, group, slowest)
        if group:
            runner = _Runner(world, step, group, comms.get(step.kind), slowest)
            timings += [runner.measure(size) for size in step.sizes]
            if step.operation == EXCHANGE:
                # not the best try: a link that loses packets at times is fast in between
                rate = step.sizes[-1] / runner.mean
                slowest = min(slowest, (next(peer for peer in group if peer != world.rank), rate), key=_rate)
    for comm in comms.values():
        comm.Free()
    set_activity("")
    version = MPI.Get_library_version().partition(",")[0].splitlines()[0].strip("\0 ")
    return FabricAnswer(OK, library=version, begin=begin, timings=tuple(timings))


def _split(world: World, step: Step, group: Sequence[int], slowest: tuple[int | None, float]) -> MPI.Comm:
    """Create a communicator for each group. Blocks in MPI; this can only hang if a rank is lost after all pairs were checked."""
    set_activity(
        str(WaitState(step.number, 0, tuple(rank for rank in range(world.size) if rank != world.rank), *slowest))
    )
    return world.comm.Split(min(group) if group else world.size, world.rank)


def _rate(pair: tuple[int | None, float]) -> float:
    return float("inf") if pair[0] is None else pair[1]


class _Runner:
    """One rank's part of one step."""

    def __init__(
        self,
        world: World,
        step: Step,
        group: tuple[int, ...],
        comm: MPI.Comm | None,
        slowest: tuple[int | None, float],
    ) -> None:
        self._world, self._step, self._group, self._comm, self._slowest = world, step, group, comm, slowest
        self._rank = world.rank
        self._peers = [rank for rank in group if rank != self._rank]
        self._note = WaitState(step.number, 0, tuple(self._peers), *slowest)
        self._waits = self._pinged = 0
        self.mean = float("inf")
        """Seconds for one operation, of all tries with the last size."""

    def measure(self, size: int) -> Timing:
        self._note = self._note._replace(size=size)
        set_activity(str(self._note))
        sent, wanted, wrong_of = self._messages(size)
        got = bytearray(len(wanted))
        before = segments()
        tries = [self._once(sent, got, size)]
        wrong = () if got == wanted else wrong_of(bytes(got))
        for _ in range(_REPEATS):
            # the group agrees on the number of tries: the slowest member decides
            if not self._go_on(sum(tries[1:])):
                break
            tries.append(self._once(sent, got, size))
        self.mean = sum(tries) / len(tries)
        return Timing(self._step.number, size, min(tries[1:]), wrong, *segments().since(before))

    def _go_on(self, spent: float) -> bool:
        """Agree with the group on whether to repeat; this also synchronises its members."""
        mine = 1 if spent < _ENOUGH_SECONDS else 0
        if self._comm is None:
            (peer,) = self._peers
            theirs = bytearray(1)
            self._wait(
                [self._world.comm.Irecv(theirs, peer, _TAG + 1), self._world.comm.Isend(bytes([mine]), peer, _TAG + 1)]
            )
            return bool(mine and theirs[0])
        from mpi4py import MPI

        agreed = bytearray(1)
        self._wait([self._comm.Iallreduce([bytes([mine]), MPI.UNSIGNED_CHAR], [agreed, MPI.UNSIGNED_CHAR], MPI.MIN)])
        return bool(agreed[0])

    def _messages(self, size: int) -> tuple[bytes, bytes, Any]:
        rank, group = self._rank, self._group
        if self._step.operation == EXCHANGE:
            (peer,) = self._peers
            return outgoing(rank, peer, size), expected(peer, rank, size), lambda _: (peer,)
        if self._step.operation == ALL_REDUCE:
            return outgoing(rank, group[0], size), expected_sum(group, group[0], size), lambda _: group
        part = _part(size, group)
        wanted = [expected(source, rank, part) for source in group]

        def wrong_of(got: bytes) -> tuple[int, ...]:
            return tuple(source for at, source in enumerate(group) if got[at * part : (at + 1) * part] != wanted[at])

        return b"".join(outgoing(rank, target, part) for target in group), b"".join(wanted), wrong_of

    def _once(self, sent: bytes, got: bytearray, size: int) -> float:
        """Run the operation once; return its seconds."""
        start = time.monotonic()
        comm = self._world.comm
        if self._step.operation == EXCHANGE:
            (peer,) = self._peers
            self._wait([comm.Irecv(got, peer, _TAG), comm.Isend(sent, peer, _TAG)])
            return time.monotonic() - start
        from mpi4py import MPI

        assert self._comm is not None  # noqa: S101 - collectives have one
        if self._step.operation == ALL_REDUCE:
            self._wait([self._comm.Iallreduce([sent, MPI.INT32_T], [got, MPI.INT32_T], MPI.SUM)])
        else:
            self._wait([self._comm.Ialltoall([sent, MPI.BYTE], [got, MPI.BYTE])])
        return time.monotonic() - start

    def _wait(self, requests: list[MPI.Request]) -> None:
        """Wait, after a moment without using a core; for a late collective, find the ranks for which it waits."""
        from mpi4py import MPI

        start = time.monotonic()
        pings: PeerPings | None = None
        self._waits += 1
        while not MPI.Request.Testall(requests):
            waited = time.monotonic() - start
            if waited > _SPIN_SECONDS:
                time.sleep(_SLEEP_SECONDS)
            if self._comm is not None and waited > _PING_AFTER_SECONDS:
                if pings is None:
                    pings = self._ping()
                silent = pings.silent_ranks()
                if waited > _REPORT_AFTER_SECONDS:
                    set_activity(str(self._note._replace(wait=self._waits, without_ping=silent)))
        if pings is not None:
            pings.end()
            set_activity(str(self._note))

    def _ping(self) -> PeerPings:
        tag = _PING_TAG + self._step.number * _PINGS_PER_STEP + self._waits
        # others may be one wait behind: the message for which they wait may have arrived here already
        earlier = () if self._pinged == self._waits - 1 else (tag - 1,)
        self._pinged = self._waits
        return PeerPings(self._world.comm, self._peers, tag, earlier)


def _part(size: int, group: Sequence[int]) -> int:
    """Return how many bytes of a message each member of an all-to-all gets: whole words."""
    return max(4, size // len(group) // 4 * 4)
