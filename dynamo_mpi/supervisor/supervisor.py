# SPDX-License-Identifier: Apache-2.0
"""Rank 0's supervisor: detects failures, writes one report, and ends all ranks, from any thread."""

from __future__ import annotations

import contextlib
import faulthandler
import math
import os
import queue
import secrets
import signal
import socket
import threading
import time
from contextlib import contextmanager

from dynamo_mpi.common.errors import ExitCode, PhaseTimeoutError
from dynamo_mpi.common.failure import (
    DetectedBy,
    Failure,
    TerminatedBySignal,
    describe_consequences,
    describe_error,
    root_cause,
)
from dynamo_mpi.common.hooks import WorkerHooks, WorldFailure
from dynamo_mpi.common.host_address import host_address
from dynamo_mpi.common.light_typing import TYPE_CHECKING
from dynamo_mpi.common.phases import phase_of_failure
from dynamo_mpi.common.ports import LOOPBACK, is_free
from dynamo_mpi.common.process import hard_exit_after, raise_nofile_limit
from dynamo_mpi.common.redact import process_redactor
from dynamo_mpi.mpi.placement import describe_ranks
from dynamo_mpi.supervisor.agent_failures import ObservedFailure, Report, encode_report
from dynamo_mpi.supervisor.failure_reports import as_document, cannot_listen, silent_host, too_late, write_failure
from dynamo_mpi.supervisor.heartbeat_protocol import TOKEN_BYTES, Frame, FrameType
from dynamo_mpi.supervisor.heartbeat_server import HeartbeatServer, RankEvents
from dynamo_mpi.supervisor.join import MAX_PENDING
from dynamo_mpi.supervisor.progress import ProgressTracker
from dynamo_mpi.supervisor.rendezvous import Rendezvous
from dynamo_mpi.supervisor.signals import SAME_SIGNAL_SECONDS
from dynamo_mpi.supervisor.stacks import describe_stacks, dump_stacks

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from typing import NoReturn

    from dynamo_mpi.mpi.placement import HasHost
    from dynamo_mpi.supervisor.context import RankContext
    from dynamo_mpi.supervisor.heartbeat_protocol import SignalMessage
    from dynamo_mpi.supervisor.rendezvous import SupervisorConfig


_HARD_EXIT_SECONDS = 15.0
# Open MPI's mpirun ends the other ranks 0.25 s after one dies: the report must be written by then
_SETTLE_SECONDS = 0.3
_SETTLE_AFTER_SIGNAL_SECONDS = 0.1
# Open MPI 5's mpirun prints nothing that ranks write more than about 50 ms after one of them has exited with a code
_SETTLE_AFTER_DEATH_SECONDS = 0.03
_HOOKS_SECONDS = 1.0
_ENDING_PHASES = ("drain", "exit")
_URGENT_CAUSES = (DetectedBy.DISCONNECT, DetectedBy.HOST_UNREACHABLE, DetectedBy.SIGNAL)


class WorldSupervisor:
    """Supervises all ranks from the preflight result on, and ends them together.

    Args:
        context: rank 0's context; its node agent, if there is one, writes the reports.
        ranks: each rank's host.
        config: the supervision's settings.
        hooks: called with the failures that end the world.

    Attributes:
        tracker: the phases of every rank.
        failures: the failures that end the world, the root cause first; empty as long as nothing has failed.

    Raises:
        UsageError: this host has no address in ``config.network``, rank 0 can't listen there, or the limit of open files is too low.
    """

    def __init__(
        self, context: RankContext, ranks: Sequence[HasHost], config: SupervisorConfig, hooks: WorkerHooks | None = None
    ) -> None:
        self._world, self._phases, self._log = context.world, context.phases, context.log
        self._agent = context.agent
        self._all_ranks_here = context.launch.local_size == context.world.size
        self._ranks, self._hooks = ranks, hooks or WorkerHooks()
        self.tracker = ProgressTracker([placement.host for placement in ranks], context.phases)
        self.failures: tuple[Failure, ...] = ()
        # a SimpleQueue, because a signal handler may put into it at any time
        self._failures_seen: queue.SimpleQueue[Failure | None] = queue.SimpleQueue()
        self.failed = threading.Event()
        self._caches: queue.SimpleQueue[tuple[int, bytes]] = queue.SimpleQueue()
        self._forwarded_at = -math.inf
        self._server: HeartbeatServer | None = None
        self.rendezvous = self._create_rendezvous(config)
        context.agent.send(f"preflight_done {self.rendezvous.as_json()}")
        threading.Thread(target=self._run, name="watch", daemon=True).start()

    def _create_rendezvous(self, config: SupervisorConfig) -> Rendezvous:
        common = (config.heartbeat_timeout, config.failure_dir, config.label, self._agent.connected, config.log_dir)
        if self._world.size == 1:
            return Rendezvous(self._log.host, "", 0, "", *common)
        raise_nofile_limit(self._world.size + MAX_PENDING)
        address = config.network or "the address of its name"
        try:
            address = config.address or self._default_address(config.network)
            family = socket.AF_INET6 if ":" in address else socket.AF_INET
            # all ranks connect at the same moment
            listener = socket.create_server((address, 0), family=family, backlog=max(128, self._world.size))
            port = listener.getsockname()[1]
            agent_endpoint = self._listen_for_agents(address, family)
            far_rank = next(
                (rank for rank, placement in enumerate(self._ranks) if placement.host != self._ranks[0].host), 0
            )
            rendezvous = Rendezvous(
                self._log.host, address, port, secrets.token_hex(TOKEN_BYTES), *common, *agent_endpoint, far_rank
            )
            self._server = server = HeartbeatServer(
                self._world.size,
                rendezvous,
                listener,
                lambda: self._phases.ahead or self._phases.current,
                lambda rank: self._ranks[rank].host,
                RankEvents(
                    self._failures_seen.put,
                    self._on_signal_of_rank,
                    self.tracker.update,
                    lambda rank, body: self._caches.put((rank, body)),
                    lambda rank, seconds: self._log.warning_aside(f"{self.name([rank])}: {silent_host(seconds)}"),
                ),
            )
        except OSError as error:
            raise cannot_listen(address, error) from None
        self._phases.on_phase(lambda name: self._broadcast(Frame(FrameType.PHASE, name.encode())))
        server.start()
        return rendezvous

    def _default_address(self, network: str | None) -> str:
        """Return loopback if the launcher says that all ranks are on this host: no other host may connect then."""
        if network is None and self._all_ranks_here and is_free(0, LOOPBACK):
            return LOOPBACK
        return host_address(network, "--liveness-network (DYN_MPI_LIVENESS_NETWORK)")

    def _listen_for_agents(self, address: str, family: int) -> tuple[int, str]:
        """Let rank 0's node agent accept the agents of other nodes; return the port, 0 for none, and the token."""
        agent = self._agent
        if not agent.connected or all(placement.host == self._ranks[0].host for placement in self._ranks):
            return 0, ""
        # created here, so that it outlives an agent that must be replaced
        with socket.create_server((address, 0), family=family, backlog=max(128, self._world.size)) as listener:
            agent.give_listener(listener.fileno())
            return listener.getsockname()[1], agent.agent_token or secrets.token_hex(TOKEN_BYTES)

    def name(self, ranks: Sequence[int]) -> str:
        """Return the names of ranks with their hosts."""
        return describe_ranks(ranks, self._ranks)

    def stacks(self) -> dict[int, str]:
        """Return the stacks of the ranks that answer within 2 s."""
        return {0: dump_stacks()} if self._server is None else self._server.stacks()

    def next_caches(self, seconds: float) -> tuple[int, bytes] | None:
        """Wait for what another rank has written of its compile caches; return the rank and its result, None after ``seconds``."""
        try:
            return self._caches.get(timeout=seconds)
        except queue.Empty:
            return None

    def abort(self, error: BaseException, code: int | None = None) -> NoReturn:
        """End all ranks because of ``error``; of several errors, the root cause is reported. Does not return.

        Args:
            error: rank 0's error.
            code: the exit code; None for the error's own.
        """
        text, own_code = describe_error(error)
        if isinstance(error, PhaseTimeoutError):
            text += self._stack_summary()
        cause = DetectedBy.SIGNAL if isinstance(error, TerminatedBySignal) else DetectedBy.REPORT
        self._report_own(text, own_code if code is None else code, cause)
        while True:  # until the process is ended
            time.sleep(_HARD_EXIT_SECONDS)

    def report_orderly_failure(self, error: BaseException, phase: str = "") -> None:
        """Report an error because of which the world shuts down in order; ``phase`` is empty for the current phase."""
        text, code = describe_error(error)
        self._publish([Failure(0, code, text, DetectedBy.REPORT, phase or self._phases.current, time.monotonic())])
        self._hooks.wait(time.monotonic() + _HOOKS_SECONDS)

    def write_failure_files(self, failures: Sequence[Failure], text: str) -> None:
        """Write the failure files if the world shuts down in order because of ``failures``; ``text`` is the logged report."""
        self._call_hooks(failures, text)
        self._write_rank0_file(failures, text)
        self._agent.send("reported")
        self._hooks.wait(time.monotonic() + _HOOKS_SECONDS)

    @contextmanager
    def deadline(self, seconds: float, what: str, flag: str = "", code: int | None = None) -> Iterator[None]:
        """End the world, with the stacks of the ranks in the report, if the body takes longer than ``seconds``.

        Args:
            seconds: the time limit.
            what: what is late.
            flag: the flag that sets the limit; empty if there is none.
            code: the exit code; None for that of deadlines.
        """
        timer = threading.Timer(seconds, self._on_deadline, (seconds, what, flag, code))
        timer.daemon, timer.name = True, "watch"
        timer.start()
        # a C thread: no Python thread runs while native code holds the GIL, as an import that starts MPI may
        faulthandler.dump_traceback_later(seconds + _HARD_EXIT_SECONDS, exit=True)
        try:
            yield
        finally:
            timer.cancel()
            # if it has fired already, it ends the world
            timer.join()
            faulthandler.cancel_dump_traceback_later()

    def close(self) -> None:
        """Stop supervising: from now on, all ranks shut down in order. Idempotent."""
        self._failures_seen.put(None)
        if self._server is not None:
            self._server.close()

    def _broadcast(self, frame: Frame) -> None:
        if self._server is not None:
            self._server.broadcast(frame)

    def _on_deadline(self, seconds: float, what: str, flag: str, code: int | None) -> None:
        self.abort(too_late(what, seconds, flag), code)  # does not return: `deadline` joins this thread

    def _stack_summary(self) -> str:
        locations = "unknown"
        with contextlib.suppress(Exception):  # an error here must not hide the deadline
            stacks = self.stacks()
            silent = [rank for rank in range(self._world.size) if rank not in stacks]
            locations = describe_stacks(stacks, silent, self.name)
        return f"\nwhere the ranks are:\n{locations}"

    def _on_signal_of_rank(self, rank: int, message: SignalMessage) -> None:
        """Handle another rank's signal as if rank 0 had got it."""
        now = time.monotonic()
        if (
            self._phases.current in _ENDING_PHASES and not message.repeated
        ) or now - self._forwarded_at <= SAME_SIGNAL_SECONDS:
            return
        self._forwarded_at = now
        # in a thread: logging may block on its reader
        threading.Thread(target=self._raise, args=(rank, message.number), name="watch", daemon=True).start()

    def _raise(self, rank: int, number: int) -> None:
        # before logging, which may block
        os.kill(os.getpid(), number)
        self._log.info(f"{self.name([rank])} got {signal.Signals(number).name}, which goes for all ranks")

    def _report_own(self, text: str, code: int, cause: DetectedBy) -> None:
        self._failures_seen.put(Failure(0, code, text, cause, self._phases.current, time.monotonic()))

    def _run(self) -> None:
        failure = self._failures_seen.get()
        if failure is not None:
            self._end(failure)

    def _end(self, failure: Failure) -> None:
        phase = self._phases.current
        self.failed.set()
        # exit even if logging blocks
        hard_exit_after(_HARD_EXIT_SECONDS, failure.exit_code)
        late = time.monotonic() + _HOOKS_SECONDS
        self._hooks.on_failure_detected()
        failures = self._collect_related_failures(failure)
        if self._already_aborted(failures):
            # it is reported, and the launcher is ending the ranks, this one included
            self._hooks.on_exit(ExitCode.DEADLINE)
            os._exit(int(ExitCode.DEADLINE))
        first = self._publish(failures, phase)
        if self._server is not None:
            self._server.announce_abort(first.exit_code)
        self._hooks.wait(late)
        self._hooks.on_exit(first.exit_code)
        self._world.abort(first.exit_code)

    def _already_aborted(self, failures: Sequence[Failure]) -> bool:
        was_stalled = self._server is not None and self._server.was_stalled
        return (
            was_stalled and self.rendezvous.has_agent and all(failure.cause in _URGENT_CAUSES for failure in failures)
        )

    def _collect_related_failures(self, seen: Failure) -> list[Failure]:
        """Wait for failures that happened before the one observed first, and for immediate consequences."""
        failures = [seen]
        now = time.monotonic()
        end = now + _SETTLE_SECONDS
        next_failure: Failure | None = seen
        while True:
            if next_failure is not None and next_failure.cause in _URGENT_CAUSES:
                is_signal = next_failure.cause is DetectedBy.SIGNAL
                end = min(end, now + (_SETTLE_AFTER_SIGNAL_SECONDS if is_signal else _SETTLE_AFTER_DEATH_SECONDS))
            try:
                next_failure = self._failures_seen.get(timeout=max(0.0, end - now))
            except queue.Empty:
                return failures
            if next_failure is not None:
                failures.append(next_failure)
            now = time.monotonic()

    def _publish(self, failures: Sequence[Failure], phase: str = "") -> Failure:
        """Write the report to log and files, and return the root cause."""
        first = root_cause(failures)
        where = (
            "" if first.rank == 0 else f"{self.name([first.rank])}{': ' if first.cause is DetectedBy.REPORT else ' '}"
        )
        parts = [
            f"error in {phase_of_failure(phase, first.phase)}: {where}{first.text}",
            describe_consequences(first, failures, self.name),
        ]
        text = "\n".join(filter(None, parts))
        ordered = [first, *(failure for failure in failures if failure is not first)]
        # before the report: what reads the log may hang
        self._call_hooks(ordered, text)
        if not self._publish_by_agent(ordered, text):
            self._log.error(text)
            self._write_rank0_file(ordered, text)
            # an agent that connects later must not write another report
            self._agent.send("reported")
        return first

    def _publish_by_agent(self, failures: Sequence[Failure], text: str) -> bool:
        """Let the node agent write the report, which is sent in one message because MPI may end this process at any moment."""
        redact = process_redactor().redact
        first, *consequences = [
            ObservedFailure(one._replace(text=redact(one.text)), self._ranks[one.rank].host) for one in failures
        ]
        report = Report(first.failure, first.host, redact(text), tuple(consequences), 0, self._log.host)
        return self._agent.publish(f"report {encode_report(report)}")

    def _write_rank0_file(self, failures: Sequence[Failure], text: str) -> None:
        """Write rank 0's failure file."""
        first, *common = failures
        consequences = [as_document(failure, self._ranks[failure.rank].host) for failure in common]
        report = {"report": text, "consequences": consequences}
        write_failure(self.rendezvous, first, self._ranks[first.rank].host, by=0, report=report)

    def _call_hooks(self, failures: Sequence[Failure], text: str) -> None:
        self.failures = tuple(failures)
        self._hooks.on_failure(WorldFailure(self.failures, self._ranks[failures[0].rank].host, text))
