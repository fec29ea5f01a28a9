# SPDX-License-Identifier: Apache-2.0
"""The side of every rank but 0: a connection to rank 0 that says that this rank lives, and why it can't go on.

It needs nothing of MPI and nothing of the engine, so it also works while both are stuck.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import os
import queue
import secrets
import selectors
import socket
import threading
import time
from typing import TYPE_CHECKING, NoReturn

from dynamo_mpi.common.exit_codes import ExitCode
from dynamo_mpi.common.failure import Cause, Failure, describe_error
from dynamo_mpi.common.hard_exit import exit_after
from dynamo_mpi.common.redact import own_redactor
from dynamo_mpi.supervisor.agent_failures import Seen, pack_seen
from dynamo_mpi.supervisor.failure_files import write_failure
from dynamo_mpi.supervisor.failure_messages import death, loss, no_way, silence
from dynamo_mpi.supervisor.frame_connection import Bell, ClosedError, Line
from dynamo_mpi.supervisor.heartbeat_protocol import (
    MOST_BODY,
    NONCE_BYTES,
    Frame,
    Join,
    Kind,
    Signalled,
    Told,
    WireError,
    clip,
    is_proof,
    prove_rank,
    prove_rank_zero,
)
from dynamo_mpi.supervisor.progress import pack_spans
from dynamo_mpi.supervisor.signal_thread import SAME_SIGNAL_SECONDS
from dynamo_mpi.supervisor.stacks import own_stacks

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from dynamo_mpi.common.errors import BootstrapError
    from dynamo_mpi.common.log import RankLogger
    from dynamo_mpi.common.phases import Phases
    from dynamo_mpi.mpi.world import World
    from dynamo_mpi.supervisor.agent_client import NodeAgentClient
    from dynamo_mpi.supervisor.rendezvous import Meeting

_CONNECT_SECONDS = 10.0
_AGAIN_SECONDS = 0.2
_RESCUE_SECONDS = 10.0
_STALL_SECONDS = 0.5
_FAREWELL_SECONDS = 1.0
# after rank 0's death: the launcher may end us first, and knows the better exit code
_DOUBT_SECONDS = 0.1
_SPEAKER_SECONDS = 0.5
# longer than rank 0 may take from its word to the end of the world. A launcher that has begun to end the ranks by itself does no more for
# MPI_Abort: `srun --kill-on-bad-exit` has sent a SIGTERM that ranks ignore, and would kill them after its KillWait, half a minute by default
_ENDING_SECONDS = 1.5
_OTHERS_SECONDS = 2.0
# longer than the deputy leaves it to the hub, and writes
_AGENT_SECONDS = 4.0
# mostly a signal comes to all ranks, and rank 0 knows what to do about it
_HOLD_SECONDS = 0.3
_ENDING = ("drain", "exit")
_LOADING = ("load", "prove")


class Lifeline:
    """Connects to rank 0, and watches it from then on.

    Args:
        meeting: where rank 0 is.
        world: all ranks.
        phases: what this rank is doing.
        log: says what rank 0 can't.
        agent: this rank's connection to its node agent.

    Raises:
        UsageError: rank 0 can't be reached.
    """

    def __init__(
        self, meeting: Meeting, world: World, phases: Phases, log: RankLogger, agent: NodeAgentClient | None = None
    ) -> None:
        self._meeting, self._world, self._phases, self._log = meeting, world, phases, log
        self._agent = agent
        self.world_phase = "load"
        self._line, self._early = connect(meeting, world.rank)
        self._bell = Bell()
        self._outbox: queue.SimpleQueue[Frame] = queue.SimpleQueue()
        self._sequence = itertools.count(1)
        self._listeners: list[Callable[[str], None]] = []
        self._mourners: list[Callable[[str], None]] = []
        # what comes of it is rank 0's affair: it ends the world, or leaves in order
        self._over = self._closing = False
        self._signalled = -math.inf
        phases.listen(lambda name: self._tell(Frame(Kind.PHASE, name.encode())))
        phases.watch(self._tell_spans)
        self._tell_spans()
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)
        self._thread.start()

    def listen(self, listener: Callable[[str], None]) -> None:
        """Call this with each phase that the world, so rank 0, begins. From the lifeline's thread."""
        self._listeners.append(listener)

    def on_end(self, mourner: Callable[[str], None]) -> None:
        """Call this with the reason as soon as the world is known to end by a failure. From any thread; it has to be quick."""
        self._mourners.append(mourner)

    def close(self) -> None:
        """Tell rank 0 that this rank leaves in order, and end the connection. Idempotent."""
        self._closing = True
        self._tell(Frame(Kind.LEAVING))
        self._thread.join(2 * _FAREWELL_SECONDS)

    def fail(self, error: BaseException) -> NoReturn:
        """Tell rank 0 why this rank can't go on, and wait for the end of the world. Does not return."""
        self._over = True  # what comes of it is not for us to report
        failure = self._failure(error)
        self._mourn(failure.text)
        told = Told(failure.exit_code, failure.phase, failure.sequence, failure.text)
        self._tell(Frame(Kind.FAILED, told.pack()))
        if self._agent is not None:
            redacted = failure._replace(text=own_redactor().redact(failure.text))
            self._agent.send(f"failure {pack_seen(Seen(redacted, self._log.host))}")
        write_failure(self._meeting, failure, self._log.host)
        # rank 0 writes the report, and ends us with all the others
        time.sleep(_RESCUE_SECONDS)
        self._log.error(f"error in {failure.phase}: rank 0 does not answer; {failure.text}")
        self._end(failure.exit_code)
        os._exit(failure.exit_code)

    def pass_on(self, number: int) -> None:
        """Tell rank 0 of a signal that came to this rank, unless the world is ending already. From the thread that the signals come to."""
        before, self._signalled = self._signalled, time.monotonic()
        if self._signalled - before <= SAME_SIGNAL_SECONDS:
            return
        again = before > -math.inf
        if not again:
            time.sleep(_HOLD_SECONDS)
        if not (self._over or self._closing) and (again or self.world_phase not in _ENDING):
            self._tell(Frame(Kind.SIGNAL, Signalled(number, again).pack()))

    def record(self, error: BaseException) -> None:
        """Write this rank's failure file; rank 0 has been told in another way."""
        write_failure(self._meeting, self._failure(error), self._log.host)

    def _failure(self, error: BaseException) -> Failure:
        text, code = describe_error(error)
        return Failure(
            self._world.rank, code, text, Cause.TOLD, self._phases.current, time.monotonic(), next(self._sequence)
        )

    def _mourn(self, why: str) -> None:
        for mourner in self._mourners:
            with contextlib.suppress(Exception):  # whatever it raises, the world has to end
                mourner(why)

    def _tell_spans(self) -> None:
        self._tell(Frame(Kind.SPANS, pack_spans(self._phases)))

    # what follows runs in the lifeline's thread

    def _tell(self, frame: Frame) -> None:
        self._outbox.put(frame)
        self._bell.ring()

    def _run(self) -> None:
        try:
            self._watch()
        except ClosedError as end:
            if not (self._over or self._closing):
                error = (loss if end.lost else death)(self._meeting.host)
                self._lose(error, lost=end.lost)
        except Exception as error:  # this rank can't be watched any longer, so nobody would see its end
            self._lose_with(*describe_error(error), Cause.TOLD, rank=self._world.rank)
        finally:
            self._line.close()
            self._bell.close()

    def _watch(self) -> None:
        with selectors.DefaultSelector() as selector:
            selector.register(self._line, selectors.EVENT_READ, self._hear)
            selector.register(self._bell, selectors.EVENT_READ, self._bell.hush)
            next_beat = self._heard = time.monotonic()
            end = 0.0
            self._take(self._early)
            while True:
                for key, _ in selector.select(max(0.0, next_beat - time.monotonic())):
                    key.data()
                while not self._outbox.empty():
                    self._line.send(self._outbox.get())
                self._line.flush()
                now = time.monotonic()
                if self._closing:
                    end = end or now + _FAREWELL_SECONDS
                    if now > end or not self._line.unsent:
                        return
                if now >= next_beat:
                    self._forgive(now - next_beat)
                    self._line.send(Frame(Kind.BEAT))
                    if self.world_phase in _LOADING:
                        # how much it has read is news all the time
                        self._line.send(Frame(Kind.SPANS, pack_spans(self._phases)))
                    self._look_for_silence(now)
                    next_beat = now + self._meeting.period / 2

    def _hear(self) -> None:
        self._take(self._line.read())

    def _take(self, frames: Sequence[Frame]) -> None:
        for frame in frames:
            self._heard = time.monotonic()
            if frame.kind is Kind.ASK:
                self._line.send(Frame(Kind.STACKS, clip(own_stacks()).encode("utf-8", "replace")))
            elif frame.kind is Kind.PHASE:
                self.world_phase = frame.body.decode("utf-8", "replace")
                for listener in self._listeners:
                    listener(self.world_phase)
            elif frame.kind in (Kind.LEAVING, Kind.ENDING):
                self._over = True
                if frame.kind is Kind.ENDING:
                    self._mourn(f"rank 0 on {self._meeting.host} ends the world")
                    self._line.send(Frame(Kind.LEAVING))
                    # rank 0 ends the world; where its launcher doesn't, we go by ourselves
                    exit_after(_ENDING_SECONDS, frame.body[0] if frame.body else int(ExitCode.ENGINE))

    def _forgive(self, late: float) -> None:
        if late > _STALL_SECONDS:
            self._heard += late

    def _look_for_silence(self, now: float) -> None:
        patience = self._meeting.patience(self.world_phase)
        if patience is not None and now - self._heard > patience and not (self._over or self._closing):
            lost = self._line.unacknowledged
            error = loss(self._meeting.host) if lost else silence(now - self._heard, self._meeting.host)
            self._lose(error, lost=lost)

    def _lose(self, error: BootstrapError, *, lost: bool) -> None:
        self._lose_with(str(error), int(error.exit_code), Cause.LOST if lost else Cause.DEATH)

    def _lose_with(self, text: str, code: int, cause: Cause, *, rank: int = 0) -> None:
        """Leave because rank 0 can't be relied on: the node agents report why, or, where there are none, the first of the other ranks."""
        self._over = True
        host = self._log.host if rank else self._meeting.host
        named = text if rank else f"rank 0 on {host} {text}"
        self._mourn(named)
        failure = Failure(rank, code, own_redactor().redact(text), cause, self.world_phase, time.monotonic())
        if self._agent is not None and self._meeting.has_agent and self._agent.await_connection(_DOUBT_SECONDS):
            self._agent.resume_agent()
            self._agent.send(f"{'failure' if rank else 'rank0_lost'} {pack_seen(Seen(failure, host))}")
            # the agent ends this rank once the cause is reported, with its exit code
            time.sleep(_AGENT_SECONDS)
            self._agent.send("reported")
            self._end(code)
        # a host that is lost may have taken rank 1 along
        speaker = (self._meeting.far_rank if cause is Cause.LOST else 0) or 1
        if self._world.rank != speaker:
            time.sleep(_OTHERS_SECONDS)
            os._exit(code)
        # where rank 0 has ended the world and that news was lost with the connection, we are gone by then
        time.sleep(_DOUBT_SECONDS)
        self._log.error(f"error in {self.world_phase}: {named}")
        write_failure(self._meeting, failure, self._log.host, by=self._world.rank)
        time.sleep(_SPEAKER_SECONDS)
        self._end(code)

    def _end(self, code: int) -> None:
        exit_after(_OTHERS_SECONDS, code)
        self._world.abort(code)


def connect(meeting: Meeting, rank: int, seconds: float = _CONNECT_SECONDS) -> tuple[Line, list[Frame]]:
    """Connect, and make sure that both are who they say. Return also what rank 0 has said since."""
    end = time.monotonic() + seconds
    while True:
        try:
            return _join(meeting, rank, end)
        except (OSError, ClosedError, WireError) as error:
            # a refusal may pass: strangers may have taken all places, or the system dropped one connection of hundreds
            if time.monotonic() + _AGAIN_SECONDS > end:
                raise no_way(meeting, str(error)) from None
            time.sleep(_AGAIN_SECONDS)


def _join(meeting: Meeting, rank: int, end: float) -> tuple[Line, list[Frame]]:
    token, nonce = bytes.fromhex(meeting.token), secrets.token_bytes(NONCE_BYTES)
    line = Line(socket.create_connection((meeting.address, meeting.port), max(0.1, end - time.monotonic())))
    try:
        hello, *_ = _await(line, Kind.HELLO, end)
        line.send(Frame(Kind.JOIN, Join(rank, nonce, prove_rank(token, hello.body, rank, nonce)).pack()))
        line.trust(MOST_BODY)
        welcome, *early = _await(line, Kind.WELCOME, end)
        if not is_proof(welcome.body, prove_rank_zero(token, nonce, rank)):
            raise WireError("whoever listens there is not rank 0 of this world")
    except BaseException:
        line.close()
        raise
    return line, early


def _await(line: Line, kind: Kind, end: float) -> list[Frame]:
    """Wait for a frame of this kind, and return it with those that came along."""
    with selectors.DefaultSelector() as selector:
        selector.register(line, selectors.EVENT_READ)
        while selector.select(max(0.0, end - time.monotonic())):
            if frames := line.read():
                if frames[0].kind is not kind:
                    raise WireError(f"{kind.name} was due, {frames[0].kind.name} came")
                return frames
    raise TimeoutError("no answer in time")
