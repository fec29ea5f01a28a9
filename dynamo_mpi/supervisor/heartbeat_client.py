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
from dynamo_mpi.common.failure import DetectedBy, Failure, describe_error
from dynamo_mpi.common.hard_exit import hard_exit_after
from dynamo_mpi.common.redact import own_redactor
from dynamo_mpi.supervisor.agent_failures import Seen, pack_seen
from dynamo_mpi.supervisor.failure_files import write_failure
from dynamo_mpi.supervisor.failure_messages import cannot_connect, heartbeat_missed, host_lost, rank_died
from dynamo_mpi.supervisor.frame_connection import ClosedError, FrameConnection, Waker
from dynamo_mpi.supervisor.heartbeat_protocol import (
    MOST_BODY,
    NONCE_BYTES,
    FailureReport,
    Frame,
    FrameType,
    Join,
    SignalMessage,
    WireError,
    clip,
    is_valid_mac,
    leader_mac,
    rank_mac,
)
from dynamo_mpi.supervisor.progress import pack_spans
from dynamo_mpi.supervisor.signal_thread import SAME_SIGNAL_SECONDS
from dynamo_mpi.supervisor.stacks import dump_stacks

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from dynamo_mpi.common.errors import DynamoMpiError
    from dynamo_mpi.common.log import RankLogger
    from dynamo_mpi.common.phases import PhaseTracker
    from dynamo_mpi.mpi.world import World
    from dynamo_mpi.supervisor.agent_client import NodeAgentClient
    from dynamo_mpi.supervisor.rendezvous import Rendezvous

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
_LOADING = ("load", "warmup")


class HeartbeatClient:
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
        self,
        meeting: Rendezvous,
        world: World,
        phases: PhaseTracker,
        log: RankLogger,
        agent: NodeAgentClient | None = None,
    ) -> None:
        self._meeting, self._world, self._phases, self._log = meeting, world, phases, log
        self._agent = agent
        self.world_phase = "load"
        self._line, self._early = connect(meeting, world.rank)
        self._bell = Waker()
        self._outbox: queue.SimpleQueue[Frame] = queue.SimpleQueue()
        self._sequence = itertools.count(1)
        self._listeners: list[Callable[[str], None]] = []
        self._mourners: list[Callable[[str], None]] = []
        # what comes of it is rank 0's affair: it ends the world, or leaves in order
        self._over = self._closing = False
        self._signalled = -math.inf
        phases.on_phase(lambda name: self._send(Frame(FrameType.PHASE, name.encode())))
        phases.on_change(self._send_timings)
        self._send_timings()
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)
        self._thread.start()

    def on_phase(self, listener: Callable[[str], None]) -> None:
        """Call this with each phase that the world, so rank 0, begins. From the lifeline's thread."""
        self._listeners.append(listener)

    def on_abort(self, mourner: Callable[[str], None]) -> None:
        """Call this with the reason as soon as the world is known to end by a failure. From any thread; it has to be quick."""
        self._mourners.append(mourner)

    def close(self) -> None:
        """Tell rank 0 that this rank leaves in order, and end the connection. Idempotent."""
        self._closing = True
        self._send(Frame(FrameType.LEAVING))
        self._thread.join(2 * _FAREWELL_SECONDS)

    def report_failure(self, error: BaseException) -> NoReturn:
        """Tell rank 0 why this rank can't go on, and wait for the end of the world. Does not return."""
        self._over = True  # what comes of it is not for us to report
        failure = self._failure(error)
        self._on_rank0_lost(failure.text)
        told = FailureReport(failure.exit_code, failure.phase, failure.sequence, failure.text)
        self._send(Frame(FrameType.FAILED, told.pack()))
        if self._agent is not None:
            redacted = failure._replace(text=own_redactor().redact(failure.text))
            self._agent.send(f"failure {pack_seen(Seen(redacted, self._log.host))}")
        write_failure(self._meeting, failure, self._log.host)
        # rank 0 writes the report, and ends us with all the others
        time.sleep(_RESCUE_SECONDS)
        self._log.error(f"error in {failure.phase}: rank 0 does not answer; {failure.text}")
        self._notify_abort(failure.exit_code)
        os._exit(failure.exit_code)

    def forward_signal(self, number: int) -> None:
        """Tell rank 0 of a signal that came to this rank, unless the world is ending already. From the thread that the signals come to."""
        before, self._signalled = self._signalled, time.monotonic()
        if self._signalled - before <= SAME_SIGNAL_SECONDS:
            return
        again = before > -math.inf
        if not again:
            time.sleep(_HOLD_SECONDS)
        if not (self._over or self._closing) and (again or self.world_phase not in _ENDING):
            self._send(Frame(FrameType.SIGNAL, SignalMessage(number, again).pack()))

    def record(self, error: BaseException) -> None:
        """Write this rank's failure file; rank 0 has been told in another way."""
        write_failure(self._meeting, self._failure(error), self._log.host)

    def _failure(self, error: BaseException) -> Failure:
        text, code = describe_error(error)
        return Failure(
            self._world.rank,
            code,
            text,
            DetectedBy.REPORT,
            self._phases.current,
            time.monotonic(),
            next(self._sequence),
        )

    def _on_rank0_lost(self, why: str) -> None:
        for mourner in self._mourners:
            with contextlib.suppress(Exception):  # whatever it raises, the world has to end
                mourner(why)

    def _send_timings(self) -> None:
        self._send(Frame(FrameType.SPANS, pack_spans(self._phases)))

    # what follows runs in the lifeline's thread

    def _send(self, frame: Frame) -> None:
        self._outbox.put(frame)
        self._bell.wake()

    def _run(self) -> None:
        try:
            self._watch()
        except ClosedError as end:
            if not (self._over or self._closing):
                error = (host_lost if end.lost else rank_died)(self._meeting.host)
                self._on_connection_lost(error, lost=end.lost)
        except Exception as error:  # this rank can't be watched any longer, so nobody would see its end
            self._lose_with(*describe_error(error), DetectedBy.REPORT, rank=self._world.rank)
        finally:
            self._line.close()
            self._bell.close()

    def _watch(self) -> None:
        with selectors.DefaultSelector() as selector:
            selector.register(self._line, selectors.EVENT_READ, self._receive)
            selector.register(self._bell, selectors.EVENT_READ, self._bell.clear)
            next_beat = self._heard = time.monotonic()
            end = 0.0
            self._handle_frame(self._early)
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
                    self._compensate_stall(now - next_beat)
                    self._line.send(Frame(FrameType.BEAT))
                    if self.world_phase in _LOADING:
                        # how much it has read is news all the time
                        self._line.send(Frame(FrameType.SPANS, pack_spans(self._phases)))
                    self._check_timeouts(now)
                    next_beat = now + self._meeting.heartbeat_interval / 2

    def _receive(self) -> None:
        self._handle_frame(self._line.read())

    def _handle_frame(self, frames: Sequence[Frame]) -> None:
        for frame in frames:
            self._heard = time.monotonic()
            if frame.kind is FrameType.ASK:
                self._line.send(Frame(FrameType.STACKS, clip(dump_stacks()).encode("utf-8", "replace")))
            elif frame.kind is FrameType.PHASE:
                self.world_phase = frame.body.decode("utf-8", "replace")
                for listener in self._listeners:
                    listener(self.world_phase)
            elif frame.kind in (FrameType.LEAVING, FrameType.ENDING):
                self._over = True
                if frame.kind is FrameType.ENDING:
                    self._on_rank0_lost(f"rank 0 on {self._meeting.host} ends the world")
                    self._line.send(Frame(FrameType.LEAVING))
                    # rank 0 ends the world; where its launcher doesn't, we go by ourselves
                    hard_exit_after(_ENDING_SECONDS, frame.body[0] if frame.body else int(ExitCode.ENGINE))

    def _compensate_stall(self, late: float) -> None:
        if late > _STALL_SECONDS:
            self._heard += late

    def _check_timeouts(self, now: float) -> None:
        patience = self._meeting.heartbeat_timeout_for(self.world_phase)
        if patience is not None and now - self._heard > patience and not (self._over or self._closing):
            lost = self._line.has_unacked_data
            error = host_lost(self._meeting.host) if lost else heartbeat_missed(now - self._heard, self._meeting.host)
            self._on_connection_lost(error, lost=lost)

    def _on_connection_lost(self, error: DynamoMpiError, *, lost: bool) -> None:
        self._lose_with(
            str(error), int(error.exit_code), DetectedBy.HOST_UNREACHABLE if lost else DetectedBy.DISCONNECT
        )

    def _lose_with(self, text: str, code: int, cause: DetectedBy, *, rank: int = 0) -> None:
        """Leave because rank 0 can't be relied on: the node agents report why, or, where there are none, the first of the other ranks."""
        self._over = True
        host = self._log.host if rank else self._meeting.host
        named = text if rank else f"rank 0 on {host} {text}"
        self._on_rank0_lost(named)
        failure = Failure(rank, code, own_redactor().redact(text), cause, self.world_phase, time.monotonic())
        if self._agent is not None and self._meeting.has_agent and self._agent.await_connection(_DOUBT_SECONDS):
            self._agent.resume_agent()
            self._agent.send(f"{'failure' if rank else 'rank0_lost'} {pack_seen(Seen(failure, host))}")
            # the agent ends this rank once the cause is reported, with its exit code
            time.sleep(_AGENT_SECONDS)
            self._agent.send("reported")
            self._notify_abort(code)
        # a host that is lost may have taken rank 1 along
        speaker = (self._meeting.far_rank if cause is DetectedBy.HOST_UNREACHABLE else 0) or 1
        if self._world.rank != speaker:
            time.sleep(_OTHERS_SECONDS)
            os._exit(code)
        # where rank 0 has ended the world and that news was lost with the connection, we are gone by then
        time.sleep(_DOUBT_SECONDS)
        self._log.error(f"error in {self.world_phase}: {named}")
        write_failure(self._meeting, failure, self._log.host, by=self._world.rank)
        time.sleep(_SPEAKER_SECONDS)
        self._notify_abort(code)

    def _notify_abort(self, code: int) -> None:
        hard_exit_after(_OTHERS_SECONDS, code)
        self._world.abort(code)


def connect(meeting: Rendezvous, rank: int, seconds: float = _CONNECT_SECONDS) -> tuple[FrameConnection, list[Frame]]:
    """Connect, and make sure that both are who they say. Return also what rank 0 has said since."""
    end = time.monotonic() + seconds
    while True:
        try:
            return _join(meeting, rank, end)
        except (OSError, ClosedError, WireError) as error:
            # a refusal may pass: strangers may have taken all places, or the system dropped one connection of hundreds
            if time.monotonic() + _AGAIN_SECONDS > end:
                raise cannot_connect(meeting, str(error)) from None
            time.sleep(_AGAIN_SECONDS)


def _join(meeting: Rendezvous, rank: int, end: float) -> tuple[FrameConnection, list[Frame]]:
    token, nonce = bytes.fromhex(meeting.token), secrets.token_bytes(NONCE_BYTES)
    line = FrameConnection(socket.create_connection((meeting.address, meeting.port), max(0.1, end - time.monotonic())))
    try:
        hello, *_ = _await(line, FrameType.HELLO, end)
        line.send(Frame(FrameType.JOIN, Join(rank, nonce, rank_mac(token, hello.body, rank, nonce)).pack()))
        line.allow_frames(MOST_BODY)
        welcome, *early = _await(line, FrameType.WELCOME, end)
        if not is_valid_mac(welcome.body, leader_mac(token, nonce, rank)):
            raise WireError("whoever listens there is not rank 0 of this world")
    except BaseException:
        line.close()
        raise
    return line, early


def _await(line: FrameConnection, kind: FrameType, end: float) -> list[Frame]:
    """Wait for a frame of this kind, and return it with those that came along."""
    with selectors.DefaultSelector() as selector:
        selector.register(line, selectors.EVENT_READ)
        while selector.select(max(0.0, end - time.monotonic())):
            if frames := line.read():
                if frames[0].kind is not kind:
                    raise WireError(f"{kind.name} was due, {frames[0].kind.name} came")
                return frames
    raise TimeoutError("no answer in time")
