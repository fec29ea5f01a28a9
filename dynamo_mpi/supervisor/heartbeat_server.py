# SPDX-License-Identifier: Apache-2.0
"""Rank 0's heartbeat server: one thread with a connection to every other rank, which detects a death within milliseconds."""

from __future__ import annotations

import math
import queue
import selectors
import threading
import time

from dynamo_mpi.common.failure import DetectedBy, Failure, describe_error
from dynamo_mpi.common.light_typing import TYPE_CHECKING, NamedTuple
from dynamo_mpi.supervisor.failure_reports import heartbeat_missed, host_lost, never_connected, rank_died
from dynamo_mpi.supervisor.frame_connection import ClosedError, FrameConnection, Silence, Waker
from dynamo_mpi.supervisor.heartbeat_protocol import (
    MAX_BODY,
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
_CLOSE_FLUSH_SECONDS = 1.0
_STALL_SECONDS = 0.5
_STALL_MEMORY_SECONDS = 2.0
_ABORT_ACK_SECONDS = 0.5
# after a rank's time is up, for the clock's resolution
_DUE_SECONDS = 0.001


class _Peer:
    """A rank that is connected."""

    def __init__(self, number: int, connection: FrameConnection, silence_seconds: float) -> None:
        self.number, self.connection, self.last_seen = number, connection, time.monotonic()
        self.silence = Silence(connection, silence_seconds)
        self.phase = ""
        # it has shut down in order, or its failure has been reported: ignore what follows
        self.done = False


class RankEvents(NamedTuple):
    """What is called from the server's thread. Each must be quick.

    Args:
        on_failure: with each failure.
        on_signal: with a rank and a signal that it got.
        on_timings: with a rank and the body of its TIMINGS frame.
        on_caches: with a rank and the body of its CACHES frame.
        on_silence: with a rank, and the seconds for which its host has acknowledged nothing.
    """

    on_failure: Callable[[Failure], None]
    on_signal: Callable[[int, SignalMessage], None]
    on_timings: Callable[[int, bytes], None] = lambda *_: None
    on_caches: Callable[[int, bytes], None] = lambda *_: None
    on_silence: Callable[[int, float], None] = lambda *_: None


class HeartbeatServer:
    """Exchanges heartbeats with the ranks other than 0, from `start` to `close`, and detects their failures.

    Args:
        size: ranks of the world.
        rendezvous: the address and settings that the ranks received.
        listener: the socket that listens at that address.
        phase: returns the phase of a rank that hasn't sent its own.
        host: returns a rank's host.
        events: called from the server's thread.
    """

    def __init__(
        self,
        size: int,
        rendezvous: Rendezvous,
        listener: socket.socket,
        phase: Callable[[], str],
        host: Callable[[int], str],
        events: RankEvents,
    ) -> None:
        self._size, self._rendezvous = size, rendezvous
        self._phase, self._host, self._events = phase, host, events
        self._selector = selectors.DefaultSelector()
        self._waker = Waker()
        self._selector.register(self._waker, selectors.EVENT_READ, self._waker.clear)
        self._join_handler = JoinHandler(self._selector, listener, bytes.fromhex(rendezvous.token), size, self._admit)
        self._outbox: queue.SimpleQueue[Frame] = queue.SimpleQueue()
        self._peers: dict[int, _Peer] = {}
        self._missing = set(range(1, size))
        self._started_at = time.monotonic()
        self._stacks: dict[int, str] = {}
        self._stacks_changed = threading.Condition()
        self._closing = False
        self._stalled_at = -math.inf
        self._abort_frame: Frame | None = None
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)

    def start(self) -> None:
        """Start the server's thread and accept ranks."""
        self._thread.start()

    def stacks(self) -> dict[int, str]:
        """Request every rank's stacks, and return those that arrive within 2 s."""
        with self._stacks_changed:
            self._stacks = {0: dump_stacks()}
        self.broadcast(Frame(FrameType.STACKS_REQUEST))
        with self._stacks_changed:
            self._stacks_changed.wait_for(lambda: len(self._stacks) == self._size, _STACKS_SECONDS)
            return dict(self._stacks)

    def broadcast(self, frame: Frame) -> None:
        """Send ``frame`` to all ranks. Thread-safe; never waits."""
        self._outbox.put(frame)
        self._waker.wake()

    @property
    def was_stalled(self) -> bool:
        """Whether this process was, until a moment ago, stopped or stuck for so long that the ranks may have ended without it."""
        return time.monotonic() - self._stalled_at < _STALL_MEMORY_SECONDS

    def announce_abort(self, code: int) -> None:
        """Send ABORTING to the ranks and wait up to 0.5 s for their acknowledgement: otherwise they would report rank 0's death."""
        self.broadcast(Frame(FrameType.ABORTING, bytes([code])))
        end = time.monotonic() + _ABORT_ACK_SECONDS
        while time.monotonic() < end and (self._missing or not all(peer.done for peer in list(self._peers.values()))):
            time.sleep(_ABORT_ACK_SECONDS / 50)

    def close(self) -> None:
        """Send the ranks GOODBYE, as rank 0 shuts down in order, and stop. Idempotent."""
        self.broadcast(Frame(FrameType.GOODBYE))
        self._thread.join(2 * _CLOSE_FLUSH_SECONDS)

    # the following methods run in the server's thread

    def _run(self) -> None:
        try:
            self._watch()
        except Exception as error:  # without this thread, failures would go unnoticed
            text, code = describe_error(error)
            self._events.on_failure(Failure(0, code, text, at=time.monotonic()))
        finally:
            self._join_handler.close()
            for peer in self._peers.values():
                peer.connection.close()
            self._selector.close()
            self._waker.close()

    def _watch(self) -> None:
        tick = self._rendezvous.heartbeat_interval / 2
        next_tick = next_heartbeat = self._started_at
        end = 0.0
        while True:
            for key, _ in self._selector.select(max(0.0, next_tick - time.monotonic())):
                key.data()
            self._handle_commands()
            now = time.monotonic()
            if self._closing:
                end = end or now + _CLOSE_FLUSH_SECONDS
                if now >= end or not any(peer.connection.unsent for peer in self._peers.values()):
                    return
            if now < next_tick:
                continue
            self._compensate_stall(now - next_tick)
            self._join_handler.tick()
            due = self._check_timeouts(now)
            if now >= next_heartbeat:
                self._send_all(Frame(FrameType.HEARTBEAT))
                next_heartbeat = now + self._rendezvous.heartbeat_interval
            next_tick = min(now + tick, end or now + tick, due)

    def _compensate_stall(self, late: float) -> None:
        """If this thread was stopped or didn't get the GIL, extend the ranks' timeouts accordingly."""
        timeout = self._rendezvous.heartbeat_timeout_for(self._phase())
        if timeout is not None and late > timeout - 2 * self._rendezvous.heartbeat_interval:
            self._stalled_at = time.monotonic()
        if late > _STALL_SECONDS:
            self._started_at += late
            for peer in self._peers.values():
                peer.last_seen += late
                peer.silence.forget()

    def _handle_commands(self) -> None:
        while not self._outbox.empty():
            frame = self._outbox.get()
            self._closing |= frame.kind is FrameType.GOODBYE
            if frame.kind is FrameType.ABORTING:
                self._abort_frame = frame
            self._send_all(frame)

    def _send_all(self, frame: Frame) -> None:
        for peer in self._peers.values():
            peer.connection.send(frame)
            self._update_events(peer)

    def _update_events(self, peer: _Peer) -> None:
        """Register the connection for the events that matter now."""
        events = selectors.EVENT_READ | (selectors.EVENT_WRITE if peer.connection.unsent else 0)
        if self._selector.get_key(peer.connection).events != events:
            self._selector.modify(peer.connection, events, lambda: self._handle_events(peer))

    def _admit(self, number: int, connection: FrameConnection) -> bool:
        if number not in self._missing:
            return False
        self._missing.discard(number)
        connection.allow_frames(MAX_BODY)
        peer = self._peers[number] = _Peer(number, connection, self._rendezvous.silence_seconds)
        self._selector.register(connection, selectors.EVENT_READ, lambda: self._handle_events(peer))
        if self._abort_frame is not None:
            # the rank joined after ABORTING was sent; send it again, after WELCOME
            self._outbox.put(self._abort_frame)
        return True

    def _handle_events(self, peer: _Peer) -> None:
        if peer.connection.unsent:
            peer.connection.flush()
            self._update_events(peer)
        try:
            for frame in peer.connection.read():
                peer.last_seen = time.monotonic()
                self._handle_frame(peer, frame)
        except ClosedError as end:
            self._drop(
                peer,
                (host_lost if end.lost else rank_died)(self._host(peer.number)),
                DetectedBy.HOST_UNREACHABLE if end.lost else DetectedBy.DISCONNECT,
            )
        except WireError:
            # an authenticated rank that sends invalid data counts as dead
            self._drop(peer, rank_died(self._host(peer.number)), DetectedBy.DISCONNECT)

    def _handle_frame(self, peer: _Peer, frame: Frame) -> None:
        if frame.kind is FrameType.STACKS:
            with self._stacks_changed:
                self._stacks[peer.number] = frame.body.decode("utf-8", "replace")
                self._stacks_changed.notify_all()
        elif frame.kind is FrameType.PHASE:
            peer.phase = frame.body.decode("utf-8", "replace")
        elif frame.kind is FrameType.TIMINGS:
            self._events.on_timings(peer.number, frame.body)
        elif frame.kind is FrameType.CACHES:
            self._events.on_caches(peer.number, frame.body)
        elif frame.kind is FrameType.GOODBYE:
            peer.done = True
        elif frame.kind is FrameType.SIGNAL:
            self._events.on_signal(peer.number, SignalMessage.unpack(frame.body))
        elif frame.kind is FrameType.FAILED:
            report = FailureReport.unpack(frame.body)
            peer.done = True
            self._events.on_failure(
                Failure(
                    peer.number,
                    report.exit_code,
                    report.text,
                    DetectedBy.REPORT,
                    report.phase,
                    time.monotonic(),
                    report.sequence,
                )
            )

    def _drop(self, peer: _Peer, error: DynamoMpiError, cause: DetectedBy) -> None:
        self._selector.unregister(peer.connection)
        peer.connection.close()
        del self._peers[peer.number]
        if not (peer.done or self._closing):
            self._report_failure(peer.number, peer.phase, error, cause)

    def _check_timeouts(self, now: float) -> float:
        """Report ranks that have been silent for too long; return when the next one will have been."""
        timeout = self._rendezvous.heartbeat_timeout_for(self._phase())
        if timeout is None or self._closing:
            return math.inf
        for peer in self._peers.values():
            if seconds := peer.silence.noticed(now):
                self._events.on_silence(peer.number, seconds)
            if not peer.done and now - peer.last_seen > timeout:
                peer.done = True
                if peer.connection.has_unacked_data:
                    self._report_failure(
                        peer.number, peer.phase, host_lost(self._host(peer.number)), DetectedBy.HOST_UNREACHABLE
                    )
                else:
                    error = heartbeat_missed(now - peer.last_seen, self._host(peer.number))
                    self._report_failure(peer.number, peer.phase, error, DetectedBy.HEARTBEAT)
        if self._missing and now - self._started_at > timeout:
            missing, self._missing = min(self._missing), set()
            self._report_failure(
                missing, "", never_connected(now - self._started_at, self._rendezvous), DetectedBy.HEARTBEAT
            )
        oldest = min((peer.last_seen for peer in self._peers.values() if not peer.done), default=math.inf)
        return max(oldest + timeout, now) + _DUE_SECONDS

    def _report_failure(self, number: int, phase: str, error: DynamoMpiError, cause: DetectedBy) -> None:
        # a rank that has just joined has not sent its phase yet
        phase = phase or self._phase()
        self._events.on_failure(Failure(number, int(error.exit_code), str(error), cause, phase, time.monotonic()))
