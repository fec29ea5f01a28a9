# SPDX-License-Identifier: Apache-2.0
"""Rank 0's guard: the one place from which a world is ended that can't end by itself, from any thread, with one report."""

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
from typing import TYPE_CHECKING, NamedTuple, NoReturn

from dynamo_mpi.common.errors import PhaseTimeoutError
from dynamo_mpi.common.exit_codes import ExitCode
from dynamo_mpi.common.failure import (
    DetectedBy,
    Failure,
    TerminatedBySignal,
    describe_consequences,
    describe_error,
    root_cause,
)
from dynamo_mpi.common.hard_exit import hard_exit_after
from dynamo_mpi.common.hooks import WorkerHooks, WorldFailure
from dynamo_mpi.common.host_address import host_address
from dynamo_mpi.common.open_files_limit import raise_nofile_limit
from dynamo_mpi.common.redact import own_redactor
from dynamo_mpi.mpi.placement import describe_ranks
from dynamo_mpi.supervisor.agent_failures import Report, Seen, pack_report
from dynamo_mpi.supervisor.failure_files import as_document, write_failure
from dynamo_mpi.supervisor.failure_messages import cannot_listen
from dynamo_mpi.supervisor.heartbeat_protocol import TOKEN_BYTES, Frame, FrameType
from dynamo_mpi.supervisor.heartbeat_server import HeartbeatServer
from dynamo_mpi.supervisor.join import MAX_PENDING
from dynamo_mpi.supervisor.progress import ProgressTracker
from dynamo_mpi.supervisor.rendezvous import Rendezvous
from dynamo_mpi.supervisor.signal_thread import SAME_SIGNAL_SECONDS
from dynamo_mpi.supervisor.stacks import describe_stacks, dump_stacks

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from dynamo_mpi.mpi.placement import HasHost
    from dynamo_mpi.supervisor.context import RankContext
    from dynamo_mpi.supervisor.heartbeat_protocol import SignalMessage


_BACKSTOP_SECONDS = 15.0
# Open MPI's mpirun ends the others 0.25 s after it has seen a rank die: the report has to be out by then
_SETTLE_SECONDS = 0.3
_SETTLE_AFTER_SIGNAL_SECONDS = 0.1
# Open MPI 5's mpirun prints nothing that ranks write later than some 50 ms after one of them has left with a code
_SETTLE_AFTER_DEATH_SECONDS = 0.03
_LEAVE_SECONDS = 1.0
_ENDING = ("drain", "exit")
_HURRYING = (DetectedBy.DISCONNECT, DetectedBy.HOST_UNREACHABLE, DetectedBy.SIGNAL)


class SupervisorConfig(NamedTuple):
    """How a world is guarded; the fields are settings of the same names.

    Args:
        network: where rank 0 listens.
        heartbeat_timeout: see `Rendezvous`.
        failure_dir: see `Rendezvous`.
        label: see `Rendezvous`.
        log_dir: see `Rendezvous`.
        address: of this host, at which rank 0 listens; empty for the one that ``network`` stands for.
    """

    network: str | None = None
    heartbeat_timeout: float | None = None
    failure_dir: str = ""
    label: str = "worker"
    log_dir: str = ""
    address: str = ""


class WorldSupervisor:
    """Watches over all ranks from the verdict on, and ends them together.

    Args:
        context: rank 0's; its node agent, where there is one, writes the reports.
        ranks: where each rank is.
        terms: how.
        hooks: called with what the world ends of.

    Attributes:
        tracker: what is known of every rank's phases.
        failures: why the world ends, the first cause first; empty as long as nothing has failed.

    Raises:
        UsageError: this host has no address by ``terms.network``, it can't be listened on, or fewer files may be open than there are ranks.
    """

    def __init__(
        self, context: RankContext, ranks: Sequence[HasHost], terms: SupervisorConfig, hooks: WorkerHooks | None = None
    ) -> None:
        self._world, self._phases, self._log = context.world, context.phases, context.log
        self._agent = context.agent
        self._ranks, self._hooks = ranks, hooks or WorkerHooks()
        self.tracker = ProgressTracker([place.host for place in ranks], context.phases)
        self.failures: tuple[Failure, ...] = ()
        # a signal's handler may put into it, whatever its thread was doing
        self._failures_seen: queue.SimpleQueue[Failure | None] = queue.SimpleQueue()
        self.failed = threading.Event()
        self._passed_on = -math.inf
        self._lookout: HeartbeatServer | None = None
        self.rendezvous = self._meet(terms)
        context.agent.send(f"preflight_done {self.rendezvous.as_json()}")
        threading.Thread(target=self._wait, name="watch", daemon=True).start()

    def _meet(self, terms: SupervisorConfig) -> Rendezvous:
        rest = (terms.heartbeat_timeout, terms.failure_dir, terms.label, self._agent.connected, terms.log_dir)
        if self._world.size == 1:
            return Rendezvous(self._log.host, "", 0, "", *rest)
        raise_nofile_limit(self._world.size + MAX_PENDING)
        address = terms.network or "the address of its name"
        try:
            address = terms.address or host_address(terms.network, "--liveness-network (DYN_MPI_LIVENESS_NETWORK)")
            family = socket.AF_INET6 if ":" in address else socket.AF_INET
            # all ranks come at the same moment
            listener = socket.create_server((address, 0), family=family, backlog=max(128, self._world.size))
            port = listener.getsockname()[1]
            agents = self._invite_agents(address, family)
            far = next((rank for rank, place in enumerate(self._ranks) if place.host != self._ranks[0].host), 0)
            meeting = Rendezvous(self._log.host, address, port, secrets.token_hex(TOKEN_BYTES), *rest, *agents, far)
            self._lookout = lookout = HeartbeatServer(
                self._world.size,
                meeting,
                listener,
                lambda: self._phases.current,
                lambda rank: self._ranks[rank].host,
                self._failures_seen.put,
                self._on_signal_of_rank,
                self.tracker.update,
            )
        except OSError as error:
            raise cannot_listen(address, error) from None
        self._phases.on_phase(lambda name: self._tell(Frame(FrameType.PHASE, name.encode())))
        lookout.start()
        return meeting

    def _invite_agents(self, address: str, family: int) -> tuple[int, str]:
        """Have rank 0's node agent hear those of other nodes, and return at which port, and what they have to know; 0 for none."""
        agent = self._agent
        if not agent.connected or all(place.host == self._ranks[0].host for place in self._ranks):
            return 0, ""
        # made here, so that it outlives an agent that has to be replaced
        with socket.create_server((address, 0), family=family, backlog=max(128, self._world.size)) as listener:
            agent.give_listener(listener.fileno())
            return listener.getsockname()[1], agent.agent_token or secrets.token_hex(TOKEN_BYTES)

    def name(self, ranks: Sequence[int]) -> str:
        """Name ranks with their hosts."""
        return describe_ranks(ranks, self._ranks)

    def stacks(self) -> dict[int, str]:
        """Return where the ranks stand, of those that answer within two seconds."""
        return {0: dump_stacks()} if self._lookout is None else self._lookout.stacks()

    def note_signal(self, number: int) -> None:
        """Take note that rank 0 was asked to end: an end that follows soon is no failure."""
        self._agent.send(f"signalled {number}")

    def abort(self, error: BaseException, code: int | None = None) -> NoReturn:
        """End all ranks because of ``error``; of several, the first cause counts. Does not return.

        Args:
            error: what to report, of rank 0.
            code: what to leave with, where it isn't the error's own.
        """
        text, own_code = describe_error(error)
        if isinstance(error, PhaseTimeoutError):
            text += self._stack_summary()
        cause = DetectedBy.SIGNAL if isinstance(error, TerminatedBySignal) else DetectedBy.REPORT
        self._note_own(text, own_code if code is None else code, cause)
        while True:  # for the end
            time.sleep(_BACKSTOP_SECONDS)

    def report_orderly_failure(self, error: BaseException, phase: str = "") -> None:
        """Report ``error``, of which the world ends in order; it happened in ``phase``, where that isn't the current one."""
        text, code = describe_error(error)
        self._publish([Failure(0, code, text, DetectedBy.REPORT, phase or self._phases.current, time.monotonic())])
        self._hooks.wait(time.monotonic() + _LEAVE_SECONDS)

    def write_failure_files(self, failures: Sequence[Failure], text: str) -> None:
        """Write down ``failures``, of which the world ends in order, for programs; ``text`` is what has been said of them."""
        self._call_hooks(failures, text)
        self._write(failures, text)
        self._agent.send("reported")
        self._hooks.wait(time.monotonic() + _LEAVE_SECONDS)

    @contextmanager
    def deadline(self, seconds: float, what: str, flag: str = "", code: int | None = None) -> Iterator[None]:
        """End the world, with a word of where each rank stands, when the body takes longer.

        Args:
            seconds: for the body.
            what: what is late.
            flag: gives it longer; empty where nothing does.
            code: what to leave with, where it isn't the one of deadlines.
        """
        timer = threading.Timer(seconds, self._late, (seconds, what, flag, code))
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
        """Stop watching: from here on, all ranks leave in order. Idempotent."""
        self._failures_seen.put(None)
        if self._lookout is not None:
            self._lookout.close()

    def _tell(self, frame: Frame) -> None:
        if self._lookout is not None:
            self._lookout.broadcast(frame)

    def _late(self, seconds: float, what: str, flag: str, code: int | None) -> None:
        longer = f"; {flag} gives it longer" if flag else ""
        error = PhaseTimeoutError(
            f"{what} after {seconds:g} s",
            needed="all ranks to come through",
            fix=f"look at the ranks that stand apart from the others{longer}",
        )
        self.abort(error, code)  # whoever waits for this thread waits for the end

    def _stack_summary(self) -> str:
        places = "unknown"
        with contextlib.suppress(Exception):  # whatever hinders it, the deadline has passed
            stacks = self.stacks()
            silent = [rank for rank in range(self._world.size) if rank not in stacks]
            places = describe_stacks(stacks, silent, self.name)
        return f"\nwhere the ranks are:\n{places}"

    def _on_signal_of_rank(self, rank: int, signalled: SignalMessage) -> None:
        """Have rank 0 do about a signal to another rank what it does about one to itself."""
        now = time.monotonic()
        if (self._phases.current in _ENDING and not signalled.again) or now - self._passed_on <= SAME_SIGNAL_SECONDS:
            return
        self._passed_on = now
        # apart from the watch, which whoever reads our words must not hold up
        threading.Thread(target=self._raise, args=(rank, signalled.number), name="watch", daemon=True).start()

    def _raise(self, rank: int, number: int) -> None:
        # before the words, as they may be late
        os.kill(os.getpid(), number)
        self._log.info(f"{self.name([rank])} got {signal.Signals(number).name}, which goes for all ranks")

    def _note_own(self, text: str, code: int, cause: DetectedBy) -> None:
        self._failures_seen.put(Failure(0, code, text, cause, self._phases.current, time.monotonic()))

    def _wait(self) -> None:
        failure = self._failures_seen.get()
        if failure is not None:
            self._end(failure)

    def _end(self, failure: Failure) -> None:
        phase = self._phases.current
        self.failed.set()
        # a reader of our words that hangs is no reason to stay
        hard_exit_after(_BACKSTOP_SECONDS, failure.exit_code)
        late = time.monotonic() + _LEAVE_SECONDS
        self._hooks.on_failure_detected()
        failures = self._collect_related_failures(failure)
        if self._already_aborted(failures):
            # it has been said, and the launcher is ending the ranks: this one was only woken for that
            self._hooks.on_exit(ExitCode.DEADLINE)
            os._exit(int(ExitCode.DEADLINE))
        first = self._publish(failures, phase)
        if self._lookout is not None:
            self._lookout.announce_abort(first.exit_code)
        self._hooks.wait(late)
        self._hooks.on_exit(first.exit_code)
        self._world.abort(first.exit_code)

    def _already_aborted(self, failures: Sequence[Failure]) -> bool:
        woken = self._lookout is not None and self._lookout.was_stalled
        return woken and self.rendezvous.has_agent and all(failure.cause in _HURRYING for failure in failures)

    def _collect_related_failures(self, seen: Failure) -> list[Failure]:
        """Wait for what may have come before the failure that was seen first, and for what follows at once."""
        failures = [seen]
        now = time.monotonic()
        end = now + _SETTLE_SECONDS
        news: Failure | None = seen
        while True:
            if news is not None and news.cause in _HURRYING:
                is_signal = news.cause is DetectedBy.SIGNAL
                end = min(end, now + (_SETTLE_AFTER_SIGNAL_SECONDS if is_signal else _SETTLE_AFTER_DEATH_SECONDS))
            try:
                news = self._failures_seen.get(timeout=max(0.0, end - now))
            except queue.Empty:
                return failures
            if news is not None:
                failures.append(news)
            now = time.monotonic()

    def _publish(self, failures: Sequence[Failure], phase: str = "") -> Failure:
        """Write the report, for people and for programs, and return the failure that it is about."""
        first = root_cause(failures)
        where = (
            "" if first.rank == 0 else f"{self.name([first.rank])}{': ' if first.cause is DetectedBy.REPORT else ' '}"
        )
        parts = [
            f"error in {phase or first.phase}: {where}{first.text}",
            describe_consequences(first, failures, self.name),
        ]
        text = "\n".join(filter(None, parts))
        ordered = [first, *(failure for failure in failures if failure is not first)]
        # before the report: what reads the log may hang
        self._call_hooks(ordered, text)
        if not self._publish_by_agent(ordered, text):
            self._log.error(text)
            self._write(ordered, text)
            # an agent that comes too late for this report must not write another
            self._agent.send("reported")
        return first

    def _publish_by_agent(self, failures: Sequence[Failure], text: str) -> bool:
        """Have the node agent write the report, in one message that is there whole or not at all: MPI may end this process at any moment."""
        redact = own_redactor().redact
        first, *later = [Seen(one._replace(text=redact(one.text)), self._ranks[one.rank].host) for one in failures]
        report = Report(first.failure, first.host, redact(text), tuple(later), 0, self._log.host)
        return self._agent.publish(f"report {pack_report(report)}")

    def _write(self, failures: Sequence[Failure], text: str) -> None:
        """Write rank 0's failure file."""
        first, *rest = failures
        later = [as_document(failure, self._ranks[failure.rank].host) for failure in rest]
        report = {"report": text, "consequences": later}
        write_failure(self.rendezvous, first, self._ranks[first.rank].host, by=0, report=report)

    def _call_hooks(self, failures: Sequence[Failure], text: str) -> None:
        self.failures = tuple(failures)
        self._hooks.on_failure(WorldFailure(self.failures, self._ranks[failures[0].rank].host, text))
