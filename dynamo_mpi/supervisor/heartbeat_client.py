# SPDX-License-Identifier: Apache-2.0
"""The heartbeat client of every rank but 0: sends heartbeats and failures to rank 0, and detects the loss of rank 0.

It uses neither MPI nor the engine, so it works even while both hang.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import os
import queue
import selectors
import threading
import time

from dynamo_mpi.common.errors import ExitCode
from dynamo_mpi.common.failure import DetectedBy, Failure, describe_error
from dynamo_mpi.common.light_typing import TYPE_CHECKING
from dynamo_mpi.common.process import hard_exit_after
from dynamo_mpi.common.redact import process_redactor
from dynamo_mpi.supervisor.agent_failures import ObservedFailure, encode_observed
from dynamo_mpi.supervisor.failure_reports import heartbeat_missed, host_lost, rank_died, silent_host, write_failure
from dynamo_mpi.supervisor.frame_connection import ClosedError, Silence, Waker
from dynamo_mpi.supervisor.heartbeat_protocol import (
    MAX_BODY,
    FailureReport,
    Frame,
    FrameType,
    SignalMessage,
    clip,
)
from dynamo_mpi.supervisor.join import connect
from dynamo_mpi.supervisor.progress import pack_timings
from dynamo_mpi.supervisor.signals import SAME_SIGNAL_SECONDS
from dynamo_mpi.supervisor.stacks import dump_stacks

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from typing import NoReturn

    from dynamo_mpi.common.errors import DynamoMpiError
    from dynamo_mpi.common.log import RankLogger
    from dynamo_mpi.common.phases import PhaseTracker
    from dynamo_mpi.mpi.world import World
    from dynamo_mpi.supervisor.agent_client import NodeAgentClient
    from dynamo_mpi.supervisor.rendezvous import Rendezvous

_RANK0_REPLY_TIMEOUT_SECONDS = 10.0
_STALL_SECONDS = 0.5
_CLOSE_FLUSH_SECONDS = 1.0
# after rank 0's death: the launcher may end this rank first, with a better exit code
_LAUNCHER_GRACE_SECONDS = 0.1
_REPORTER_DELAY_SECONDS = 0.5
# longer than rank 0 needs from its ABORTING frame to MPI_Abort. A launcher that has begun to end the ranks by itself ignores MPI_Abort:
# `srun --kill-on-bad-exit` has sent a SIGTERM that ranks ignore, and would kill them after its KillWait, half a minute by default
_ABORT_GRACE_SECONDS = 1.5
_FOLLOWER_EXIT_DELAY_SECONDS = 2.0
# longer than the deputy waits for the hub and then writes the report
_AGENT_REPORT_SECONDS = 4.0
# usually all ranks get the signal, and rank 0 handles it
_SIGNAL_DEDUP_SECONDS = 0.3
_ENDING_PHASES = ("drain", "exit")
_LOADING_PHASES = ("load", "warmup")


class HeartbeatClient:
    """Connects to rank 0 and exchanges heartbeats with it.

    Args:
        rendezvous: rank 0's address and settings.
        world: all ranks.
        phases: this rank's phases.
        log: logs what rank 0 can't report.
        agent: this rank's connection to its node agent.

    Raises:
        RetryableError: rank 0 can't be reached.
    """

    def __init__(
        self,
        rendezvous: Rendezvous,
        world: World,
        phases: PhaseTracker,
        log: RankLogger,
        agent: NodeAgentClient | None = None,
    ) -> None:
        self._rendezvous, self._world, self._phases, self._log = rendezvous, world, phases, log
        self._agent = agent
        self.world_phase = "load"
        self._connection, self._early_frames = connect(rendezvous, world.rank)
        self._waker = Waker()
        self._outbox: queue.SimpleQueue[Frame] = queue.SimpleQueue()
        self._sequence = itertools.count(1)
        self._phase_callbacks: list[Callable[[str], None]] = []
        self._abort_callbacks: list[Callable[[str], None]] = []
        # rank 0 ends the world (`_ending`), or this rank shuts down in order (`_closing`): a lost connection is no failure then
        self._ending = self._closing = False
        self._signalled = -math.inf
        self._silence = Silence(self._connection, rendezvous.silence_seconds)
        phases.on_phase(lambda name: self._send(Frame(FrameType.PHASE, name.encode())))
        phases.on_change(self._send_timings)
        self._send_timings()
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)
        self._thread.start()

    def on_phase(self, callback: Callable[[str], None]) -> None:
        """Call ``callback`` with each phase that rank 0, and so the world, begins. From this client's thread."""
        self._phase_callbacks.append(callback)

    def on_abort(self, callback: Callable[[str], None]) -> None:
        """Call ``callback`` with the reason as soon as it is known that the world ends by a failure. From any thread; it must be quick."""
        self._abort_callbacks.append(callback)

    def send_caches(self, result: bytes) -> None:
        """Send rank 0 what this rank has written of its compile caches. From any thread."""
        self._send(Frame(FrameType.CACHES, result[:MAX_BODY]))

    def close(self) -> None:
        """Send rank 0 a GOODBYE frame and close the connection: this rank shuts down in order. Idempotent."""
        self._closing = True
        self._send(Frame(FrameType.GOODBYE))
        self._thread.join(2 * _CLOSE_FLUSH_SECONDS)

    def report_failure(self, error: BaseException) -> NoReturn:
        """Report to rank 0 why this rank can't go on, and wait until the world ends. Does not return."""
        self._ending = True  # rank 0 reports it
        failure = self._failure(error)
        self._on_rank0_lost(failure.text)
        report = FailureReport(failure.exit_code, failure.phase, failure.sequence, failure.text)
        self._send(Frame(FrameType.FAILED, report.pack()))
        if self._agent is not None:
            redacted = failure._replace(text=process_redactor().redact(failure.text))
            self._agent.send(f"failure {encode_observed(ObservedFailure(redacted, self._log.host))}")
        write_failure(self._rendezvous, failure, self._log.host)
        # rank 0 writes the report and ends all ranks
        time.sleep(_RANK0_REPLY_TIMEOUT_SECONDS)
        self._log.error(f"error in {failure.phase}: rank 0 does not answer; {failure.text}")
        self._notify_abort(failure.exit_code)
        os._exit(failure.exit_code)

    def forward_signal(self, number: int) -> None:
        """Forward a signal of this rank to rank 0, unless the world is ending already. From the thread that receives the signals."""
        previous, self._signalled = self._signalled, time.monotonic()
        if self._signalled - previous <= SAME_SIGNAL_SECONDS:
            return
        repeated = previous > -math.inf
        if not repeated:
            time.sleep(_SIGNAL_DEDUP_SECONDS)
        if not (self._ending or self._closing) and (repeated or self.world_phase not in _ENDING_PHASES):
            self._send(Frame(FrameType.SIGNAL, SignalMessage(number, repeated).pack()))

    def record(self, error: BaseException) -> None:
        """Write this rank's failure file; rank 0 gets the error in another way."""
        write_failure(self._rendezvous, self._failure(error), self._log.host)

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
        for callback in self._abort_callbacks:
            with contextlib.suppress(Exception):  # the world must end, whatever a callback raises
                callback(why)

    def _send_timings(self) -> None:
        self._send(Frame(FrameType.TIMINGS, pack_timings(self._phases)))

    # the following methods run in this client's thread

    def _send(self, frame: Frame) -> None:
        self._outbox.put(frame)
        self._waker.wake()

    def _run(self) -> None:
        try:
            self._watch()
        except ClosedError as end:
            if not (self._ending or self._closing):
                error = (host_lost if end.lost else rank_died)(self._rendezvous.host)
                self._on_connection_lost(error, lost=end.lost)
        except Exception as error:  # without this thread, nothing would notice if this rank hangs
            self._exit_without_rank0(*describe_error(error), DetectedBy.REPORT, rank=self._world.rank)
        finally:
            self._connection.close()
            self._waker.close()

    def _watch(self) -> None:
        with selectors.DefaultSelector() as selector:
            selector.register(self._connection, selectors.EVENT_READ, self._receive)
            selector.register(self._waker, selectors.EVENT_READ, self._waker.clear)
            next_heartbeat = self._last_seen = time.monotonic()
            end = 0.0
            self._handle_frame(self._early_frames)
            while True:
                for key, _ in selector.select(max(0.0, next_heartbeat - time.monotonic())):
                    key.data()
                while not self._outbox.empty():
                    self._connection.send(self._outbox.get())
                self._connection.flush()
                now = time.monotonic()
                if self._closing:
                    end = end or now + _CLOSE_FLUSH_SECONDS
                    if now > end or not self._connection.unsent:
                        return
                if now >= next_heartbeat:
                    self._compensate_stall(now - next_heartbeat)
                    # before anything is sent: no host acknowledges that at once
                    self._check_timeouts(now)
                    self._connection.send(Frame(FrameType.HEARTBEAT))
                    if self.world_phase in _LOADING_PHASES:
                        # the number of bytes read changes all the time
                        self._connection.send(Frame(FrameType.TIMINGS, pack_timings(self._phases)))
                    next_heartbeat = now + self._rendezvous.heartbeat_interval / 2

    def _receive(self) -> None:
        self._handle_frame(self._connection.read())

    def _handle_frame(self, frames: Sequence[Frame]) -> None:
        for frame in frames:
            self._last_seen = time.monotonic()
            if frame.kind is FrameType.STACKS_REQUEST:
                self._connection.send(Frame(FrameType.STACKS, clip(dump_stacks()).encode("utf-8", "replace")))
            elif frame.kind is FrameType.PHASE:
                self.world_phase = frame.body.decode("utf-8", "replace")
                for callback in self._phase_callbacks:
                    callback(self.world_phase)
            elif frame.kind in (FrameType.GOODBYE, FrameType.ABORTING):
                self._ending = True
                if frame.kind is FrameType.ABORTING:
                    self._on_rank0_lost(f"rank 0 on {self._rendezvous.host} ends the world")
                    self._connection.send(Frame(FrameType.GOODBYE))
                    # rank 0 calls MPI_Abort; if the launcher doesn't end this rank, it exits by itself
                    hard_exit_after(_ABORT_GRACE_SECONDS, frame.body[0] if frame.body else int(ExitCode.ENGINE))

    def _compensate_stall(self, late: float) -> None:
        if late > _STALL_SECONDS:
            self._last_seen += late
            self._silence.forget()

    def _check_timeouts(self, now: float) -> None:
        seconds = self._silence.noticed(now)
        if seconds and self._world.rank == (self._rendezvous.far_rank or 1):  # one of them is enough
            self._log.warning_aside(f"rank 0 on {self._rendezvous.host}: {silent_host(seconds)}")
        timeout = self._rendezvous.heartbeat_timeout_for(self.world_phase)
        if timeout is not None and now - self._last_seen > timeout and not (self._ending or self._closing):
            lost = self._connection.has_unacked_data
            error = (
                host_lost(self._rendezvous.host)
                if lost
                else heartbeat_missed(now - self._last_seen, self._rendezvous.host)
            )
            self._on_connection_lost(error, lost=lost)

    def _on_connection_lost(self, error: DynamoMpiError, *, lost: bool) -> None:
        self._exit_without_rank0(
            str(error), int(error.exit_code), DetectedBy.HOST_UNREACHABLE if lost else DetectedBy.DISCONNECT
        )

    def _exit_without_rank0(self, text: str, code: int, cause: DetectedBy, *, rank: int = 0) -> None:
        """Exit because rank 0 is lost: the node agents report why, or, if there are none, the first of the other ranks."""
        self._ending = True
        host = self._log.host if rank else self._rendezvous.host
        named = text if rank else f"rank 0 on {host} {text}"
        self._on_rank0_lost(named)
        failure = Failure(rank, code, process_redactor().redact(text), cause, self.world_phase, time.monotonic())
        if (
            self._agent is not None
            and self._rendezvous.has_agent
            and self._agent.await_connection(_LAUNCHER_GRACE_SECONDS)
        ):
            self._agent.resume_agent()
            self._agent.send(f"{'failure' if rank else 'rank0_lost'} {encode_observed(ObservedFailure(failure, host))}")
            # the agent ends this rank, with the cause's exit code, after the cause is reported
            time.sleep(_AGENT_REPORT_SECONDS)
            self._agent.send("reported")
            self._notify_abort(code)
        # rank 1 may have been on the lost host
        reporter = (self._rendezvous.far_rank if cause is DetectedBy.HOST_UNREACHABLE else 0) or 1
        if self._world.rank != reporter:
            time.sleep(_FOLLOWER_EXIT_DELAY_SECONDS)
            os._exit(code)
        # if rank 0 has aborted and its ABORTING frame was lost with the connection, this rank is killed during this pause
        time.sleep(_LAUNCHER_GRACE_SECONDS)
        self._log.error(f"error in {self.world_phase}: {named}")
        write_failure(self._rendezvous, failure, self._log.host, by=self._world.rank)
        time.sleep(_REPORTER_DELAY_SECONDS)
        self._notify_abort(code)

    def _notify_abort(self, code: int) -> None:
        hard_exit_after(_FOLLOWER_EXIT_DELAY_SECONDS, code)
        self._world.abort(code)
