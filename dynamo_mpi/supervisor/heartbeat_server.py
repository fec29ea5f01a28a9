# SPDX-License-Identifier: Apache-2.0
"""Rank 0's side of liveness: one thread that holds a connection to every other rank, and sees within milliseconds when one has gone."""

from __future__ import annotations

import math
import queue
import selectors
import threading
import time
from typing import TYPE_CHECKING

from dynamo_mpi.common.failure import DetectedBy, Failure, describe_error
from dynamo_mpi.supervisor.failure_messages import heartbeat_missed, host_lost, never_connected, rank_died
from dynamo_mpi.supervisor.frame_connection import ClosedError, FrameConnection, Waker
from dynamo_mpi.supervisor.heartbeat_protocol import (
    MOST_BODY,
    FailureReport,
    Frame,
    FrameType,
    SignalMessage,
    WireError,
)
from dynamo_mpi.supervisor.join import JoinHandler
from dynamo_mpi.supervisor.stacks import dump_stacks

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable

    from dynamo_mpi.common.errors import DynamoMpiError
    from dynamo_mpi.supervisor.rendezvous import Rendezvous

_STACKS_SECONDS = 2.0
_FAREWELL_SECONDS = 1.0
_STALL_SECONDS = 0.5
_MOMENT_SECONDS = 2.0
_HEED_SECONDS = 0.5


class _Peer:
    """A rank that is connected."""

    def __init__(self, number: int, line: FrameConnection) -> None:
        self.number, self.line, self.heard = number, line, time.monotonic()
        self.phase = ""
        # nothing that comes after is news: it has left in order, or its trouble has been told
        self.done = False


class HeartbeatServer:
    """Watches over the ranks other than 0, from `start` to `close`.

    Args:
        size: ranks of the world.
        meeting: what the ranks were told.
        listener: listens where they were told.
        phase: what the world is doing.
        host: names a rank's host.
        on_failure: called from the lookout's thread with each failure. It has to be quick.
        on_signal: the same, with a rank and a signal that came to it.
        on_spans: the same, with a rank and what it tells of its phases.
    """

    def __init__(
        self,
        size: int,
        meeting: Rendezvous,
        listener: socket.socket,
        phase: Callable[[], str],
        host: Callable[[int], str],
        on_failure: Callable[[Failure], None],
        on_signal: Callable[[int, SignalMessage], None],
        on_spans: Callable[[int, bytes], None] = lambda *_: None,
    ) -> None:
        self._size, self._meeting = size, meeting
        self._phase, self._host, self._on_failure, self._on_signal = phase, host, on_failure, on_signal
        self._on_spans = on_spans
        self._selector = selectors.DefaultSelector()
        self._bell = Waker()
        self._selector.register(self._bell, selectors.EVENT_READ, self._bell.clear)
        self._reception = JoinHandler(self._selector, listener, bytes.fromhex(meeting.token), size, self._admit)
        self._orders: queue.SimpleQueue[Frame] = queue.SimpleQueue()
        self._ranks: dict[int, _Peer] = {}
        self._missing = set(range(1, size))
        self._begun = time.monotonic()
        self._answers: dict[int, str] = {}
        self._answered = threading.Condition()
        self._leaving = False
        self._overslept = -math.inf
        self._ending: Frame | None = None
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)

    def start(self) -> None:
        """Begin: ranks may come."""
        self._thread.start()

    def stacks(self) -> dict[int, str]:
        """Ask every rank where it stands, and return what those have answered that could, within two seconds."""
        with self._answered:
            self._answers = {0: dump_stacks()}
        self.broadcast(Frame(FrameType.ASK))
        with self._answered:
            self._answered.wait_for(lambda: len(self._answers) == self._size, _STACKS_SECONDS)
            return dict(self._answers)

    def broadcast(self, frame: Frame) -> None:
        """Send ``frame`` to all ranks. Thread-safe, never waits."""
        self._orders.put(frame)
        self._bell.wake()

    @property
    def was_stalled(self) -> bool:
        """Whether this process was stopped or stuck for so long, until a moment ago, that the ranks may have ended the world without it."""
        return time.monotonic() - self._overslept < _MOMENT_SECONDS

    def announce_abort(self, code: int) -> None:
        """Tell the ranks that rank 0 ends the world, and wait a moment for them to know: a rank that only saw it go would report a death."""
        self.broadcast(Frame(FrameType.ENDING, bytes([code])))
        end = time.monotonic() + _HEED_SECONDS
        while time.monotonic() < end and (self._missing or not all(rank.done for rank in list(self._ranks.values()))):
            time.sleep(_HEED_SECONDS / 50)

    def close(self) -> None:
        """Tell the ranks that rank 0 leaves in order, and end. Idempotent."""
        self.broadcast(Frame(FrameType.LEAVING))
        self._thread.join(2 * _FAREWELL_SECONDS)

    # what follows runs in the lookout's thread

    def _run(self) -> None:
        try:
            self._watch()
        except Exception as error:  # a watchman who drops dead must not look like a quiet night
            text, code = describe_error(error)
            self._on_failure(Failure(0, code, text, at=time.monotonic()))
        finally:
            self._reception.close()
            for rank in self._ranks.values():
                rank.line.close()
            self._selector.close()
            self._bell.close()

    def _watch(self) -> None:
        tick = self._meeting.heartbeat_interval / 2
        next_tick = next_beat = self._begun
        end = 0.0
        while True:
            for key, _ in self._selector.select(max(0.0, next_tick - time.monotonic())):
                key.data()
            self._handle_commands()
            now = time.monotonic()
            if self._leaving:
                end = end or now + _FAREWELL_SECONDS
                if now >= end or not any(rank.line.unsent for rank in self._ranks.values()):
                    return
            if now < next_tick:
                continue
            self._compensate_stall(now - next_tick)
            self._reception.tick()
            self._check_timeouts(now)
            if now >= next_beat:
                self._send_all(Frame(FrameType.BEAT))
                next_beat = now + self._meeting.heartbeat_interval
            next_tick = min(now + tick, end or now + tick)

    def _compensate_stall(self, late: float) -> None:
        """Where it was this thread that slept, or did not get Python's lock, that is not held against the ranks."""
        patience = self._meeting.heartbeat_timeout_for(self._phase())
        if patience is not None and late > patience - 2 * self._meeting.heartbeat_interval:
            self._overslept = time.monotonic()
        if late > _STALL_SECONDS:
            self._begun += late
            for rank in self._ranks.values():
                rank.heard += late

    def _handle_commands(self) -> None:
        while not self._orders.empty():
            frame = self._orders.get()
            self._leaving |= frame.kind is FrameType.LEAVING
            if frame.kind is FrameType.ENDING:
                self._ending = frame
            self._send_all(frame)

    def _send_all(self, frame: Frame) -> None:
        for rank in self._ranks.values():
            rank.line.send(frame)
            self._follow(rank)

    def _follow(self, rank: _Peer) -> None:
        """Have the selector look at what matters for a rank's line now."""
        events = selectors.EVENT_READ | (selectors.EVENT_WRITE if rank.line.unsent else 0)
        if self._selector.get_key(rank.line).events != events:
            self._selector.modify(rank.line, events, lambda: self._serve(rank))

    def _admit(self, number: int, line: FrameConnection) -> bool:
        if number not in self._missing:
            return False
        self._missing.discard(number)
        line.allow_frames(MOST_BODY)
        rank = self._ranks[number] = _Peer(number, line)
        self._selector.register(line, selectors.EVENT_READ, lambda: self._serve(rank))
        if self._ending is not None:
            # it came too late to hear of it; to be sent behind its welcome
            self._orders.put(self._ending)
        return True

    def _serve(self, rank: _Peer) -> None:
        if rank.line.unsent:
            rank.line.flush()
            self._follow(rank)
        try:
            for frame in rank.line.read():
                rank.heard = time.monotonic()
                self._handle_frame(rank, frame)
        except ClosedError as end:
            self._drop(
                rank,
                (host_lost if end.lost else rank_died)(self._host(rank.number)),
                DetectedBy.HOST_UNREACHABLE if end.lost else DetectedBy.DISCONNECT,
            )
        except WireError:
            # it has the token, so it is a rank of ours that writes nonsense: as good as dead
            self._drop(rank, rank_died(self._host(rank.number)), DetectedBy.DISCONNECT)

    def _handle_frame(self, rank: _Peer, frame: Frame) -> None:
        if frame.kind is FrameType.STACKS:
            with self._answered:
                self._answers[rank.number] = frame.body.decode("utf-8", "replace")
                self._answered.notify_all()
        elif frame.kind is FrameType.PHASE:
            rank.phase = frame.body.decode("utf-8", "replace")
        elif frame.kind is FrameType.SPANS:
            self._on_spans(rank.number, frame.body)
        elif frame.kind is FrameType.LEAVING:
            rank.done = True
        elif frame.kind is FrameType.SIGNAL:
            self._on_signal(rank.number, SignalMessage.unpack(frame.body))
        elif frame.kind is FrameType.FAILED:
            told = FailureReport.unpack(frame.body)
            rank.done = True
            self._on_failure(
                Failure(
                    rank.number,
                    told.exit_code,
                    told.text,
                    DetectedBy.REPORT,
                    told.phase,
                    time.monotonic(),
                    told.sequence,
                )
            )

    def _drop(self, rank: _Peer, error: DynamoMpiError, cause: DetectedBy) -> None:
        self._selector.unregister(rank.line)
        rank.line.close()
        del self._ranks[rank.number]
        if not (rank.done or self._leaving):
            self._fail(rank.number, rank.phase, error, cause)

    def _check_timeouts(self, now: float) -> None:
        patience = self._meeting.heartbeat_timeout_for(self._phase())
        if patience is None or self._leaving:
            return
        for rank in self._ranks.values():
            if not rank.done and now - rank.heard > patience:
                rank.done = True
                if rank.line.has_unacked_data:
                    self._fail(rank.number, rank.phase, host_lost(self._host(rank.number)), DetectedBy.HOST_UNREACHABLE)
                else:
                    error = heartbeat_missed(now - rank.heard, self._host(rank.number))
                    self._fail(rank.number, rank.phase, error, DetectedBy.HEARTBEAT)
        if self._missing and now - self._begun > patience:
            missing, self._missing = min(self._missing), set()
            self._fail(missing, "", never_connected(now - self._begun, self._meeting), DetectedBy.HEARTBEAT)

    def _fail(self, number: int, phase: str, error: DynamoMpiError, cause: DetectedBy) -> None:
        # one that has not told its phase yet has just come
        phase = phase or self._phase()
        self._on_failure(Failure(number, int(error.exit_code), str(error), cause, phase, time.monotonic()))
