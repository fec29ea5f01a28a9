# SPDX-License-Identifier: Apache-2.0
"""Rank 0's lifecycle with TensorRT-LLM after preflight: session, child process, readiness probe, and a bounded shutdown."""

from __future__ import annotations

import contextlib
import math
import os
import queue
import secrets
import signal
import threading
import time
from functools import partial
from typing import TYPE_CHECKING, Any

from dynamo_mpi.common.credentials import clients_environ
from dynamo_mpi.common.errors import DynamoMpiError, ExitCode, RetryableError, of_signal
from dynamo_mpi.common.failure import TerminatedBySignal
from dynamo_mpi.common.hooks import WorkerHook
from dynamo_mpi.common.log import print_trtllm_launch_line
from dynamo_mpi.common.process import DRAIN_SIGNALS
from dynamo_mpi.common.waiting import call_if_late, start_thread
from dynamo_mpi.discovery.registration_monitor import RegistrationMonitor
from dynamo_mpi.engines.trtllm.child_command import SessionAddress, child_command, child_environment, drain_seconds
from dynamo_mpi.engines.trtllm.endings import (
    ChildExited,
    ChildExitError,
    Event,
    FirstCompletion,
    LeaseLost,
    Registered,
    SignalReceived,
    close_session,
    innermost_error,
    ranks_left,
    readiness_error,
    stopped,
    why_left,
)
from dynamo_mpi.engines.trtllm.process import ReadinessProbe, TrtllmProcess, exit_code_for
from dynamo_mpi.engines.trtllm.session import Session, SessionDir
from dynamo_mpi.engines.trtllm.task import install, prepare_rank
from dynamo_mpi.mpi.job_time_limit import schedule_drain, time_limit_reached
from dynamo_mpi.runtime.worker_record import remove_ready_file
from dynamo_mpi.supervisor.signals import SAME_SIGNAL_SECONDS, SignalThread, signals_of

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from dynamo_mpi.engines.trtllm.task import TaskEnd
    from dynamo_mpi.runtime.worker_hooks import WorkerContext

_KEY_BYTES = 32
# a prefill worker waits this long for its KV transfers
_PREFILL_DRAIN_SECONDS = 30.0
_SHUTDOWN_SECONDS = 30.0
_RELEASE_SECONDS = 60.0
_DEREGISTER_SECONDS = 0.5
_FIRST_CAUSE_SECONDS = 0.5
_KILLED_SECONDS = 0.1
# a child that somebody else ends revokes its lease, and then closes its engine
_LEASE_TO_EXIT_SECONDS = 5.0
# the child closes its engine before it exits; rank 0's failed start makes it raise, then exit
_CHILD_FIRST_SECONDS = 20.0
# of another rank's failed start it learns nothing
_CHILD_UNAWARE_SECONDS = 1.0


class TrtllmRunner(WorkerHook):
    """Runs one TensorRT-LLM worker on rank 0.

    Args:
        worker: rank 0's shared objects.
        gpus_per_node: number of GPUs, and of ranks, of each node.
        token_id: the prompt of the first completion.
        model_dir: the folder from which the engine loads the model: the model's own, or its copy on each node.
        log_probs: whether to look at its log probabilities.
    """

    def __init__(
        self, worker: WorkerContext, gpus_per_node: int, token_id: int, model_dir: str, *, log_probs: bool
    ) -> None:
        self._world, self._phases, self._log = worker.rank.world, worker.rank.phases, worker.rank.log
        self._settings, self._supervisor, self._agent = worker.settings, worker.supervisor, worker.rank.agent
        self._gpus_per_node, self._token_id, self._log_probs = gpus_per_node, token_id, log_probs
        self._model_dir = model_dir
        self._instance_lease, self._signals = worker.instance_lease, signals_of(worker.rank.launch.launcher)
        worker.hooks.add(self)
        self._events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        self._serving = self._shutdown_requested = self._is_draining = self._finished = False
        self._drain_seconds = 0.0
        self._last_signal = -math.inf
        self._registered = False
        settings = worker.settings
        self._monitor = RegistrationMonitor(
            settings.endpoint,
            clients_environ(),
            settings.probe_timeout,
            self._log,
            pauses=True,
            has_failed=worker.supervisor.failed.is_set,
        )
        self._child: TrtllmProcess | None = None
        self._stop_timer: threading.Timer | None = None
        self._readiness_probe: ReadinessProbe | None = None
        self._session_dir: SessionDir | None = None
        self._session: Session | None = None

    def run(self, on_ready: Callable[[], None]) -> ExitCode:
        """Run the worker until SIGTERM, SIGINT, SIGUSR2, shortly before the job's time limit, or the loss of its lease. Any other failure
        aborts the world.

        Args:
            on_ready: called when the worker is registered and has answered its first completion.

        Returns:
            The exit code: 75 if the lease was lost, which has been reported.
        """
        loss: DynamoMpiError | None = None
        signals = SignalThread(self._on_signal, self._signals)
        try:
            with self._phases.enter("load"), self._deadline(self._settings.load_timeout):
                child, session = self._start()
                self._wait_for(Registered)
            with (
                self._phases.enter("warmup"),
                self._supervisor.deadline(self._settings.warmup_timeout, "no first completion", "--warmup-timeout"),
            ):
                self._warm_up()
            self._remove_session_dir()
            self._serving = True
            on_ready()
            cancel_drain = schedule_drain(
                os.environ, self._max_drain_seconds + _RELEASE_SECONDS, self._on_time_limit, self._log.warning
            )
            with self._phases.enter("serve"):
                event = self._wait_for(SignalReceived, LeaseLost, ChildExited)
                cancel_drain()
            with self._phases.enter("drain"):
                loss = self._loss_of(event)
                self._drain(child, session, loss)
                self._instance_lease.revoke_leftover()
            with self._phases.enter("exit"):
                close_session(session, _RELEASE_SECONDS)
                if loss is not None:
                    self._supervisor.report_orderly_failure(loss, "serve")
        except TerminatedBySignal as error:
            self._supervisor.abort(loss or error, exit_code_for(0 if loss else -error.number))
        except ChildExitError as error:
            self._supervisor.abort(loss or error, exit_code_for(0 if loss else error.code))
        except Exception as error:  # any error: the other ranks may be inside the engine's collectives
            self._supervisor.abort(loss or error)
        finally:
            remove_ready_file(self._settings.ready_file)
        signals.close()
        self._finished = True
        return ExitCode.OK if loss is None else ExitCode.TEMPORARY

    def _deadline(self, seconds: float) -> contextlib.AbstractContextManager[None]:
        return self._supervisor.deadline(seconds, "dynamo.trtllm was not registered", "--load-timeout")

    def _start(self) -> tuple[TrtllmProcess, Session]:
        """Start the child, then the session: the child needs as long as the ranks to import the engine, and waits for the session."""
        comm, tasks = self._world.duplicate(), self._world.duplicate()
        install(tasks, self._supervisor.abort)
        print_trtllm_launch_line("leader", self._world.rank, self._world.size)
        prepare_rank(self._world, self._log.warning)
        self._session_dir = SessionDir()
        key = secrets.token_bytes(_KEY_BYTES)
        child = self._start_child(SessionAddress(self._session_dir.address, key.hex(), self._world.size))
        session = Session(comm, self._session_dir.address, key)
        self._session = session
        session.start(self._on_ranks_left, self._supervisor.abort)
        return child, session

    def _start_child(self, address: SessionAddress) -> TrtllmProcess:
        settings = self._settings
        environment = child_environment(clients_environ(), address, settings)
        child = TrtllmProcess(
            child_command(settings, self._gpus_per_node, self._model_dir),
            environment,
            self._on_child_exit,
            self._on_child_stopped,
            address.key,
        )
        self._drain_seconds = drain_seconds(environment)
        self._child = child
        self._readiness_probe = ReadinessProbe(
            settings, child.pid, self._token_id, self._log_probs, environment, self._on_readiness_event
        )
        return child

    def _warm_up(self) -> None:
        if self._settings.role == "encode":
            self._log.info("registered; an encode worker answers no completion, so none was asked for")
            return
        self._wait_for(FirstCompletion)

    def _wait_for(self, *kinds: type[Event]) -> Event:
        """Wait for an event of these kinds; ignore others."""
        while True:
            event = self._events.get()
            if isinstance(event, kinds):
                return event

    @property
    def _max_drain_seconds(self) -> float:
        """Seconds that the child may take to exit."""
        seconds = self._drain_seconds + _SHUTDOWN_SECONDS
        return seconds + _PREFILL_DRAIN_SECONDS if self._settings.role == "prefill" else seconds

    def _loss_of(self, event: Event) -> DynamoMpiError | None:
        """Return the error if serving ends by an event other than a signal: the lease is lost, or the child has exited as if it were; None
        for a signal."""
        if isinstance(event, ChildExited):
            return ChildExitError(event.code, event.lines, self._monitor.lost_lease_reason())
        return event.error if isinstance(event, LeaseLost) else None

    def _drain(self, child: TrtllmProcess, session: Session, loss: DynamoMpiError | None) -> None:
        """Let the child deregister, finish its requests and shut down its engine.

        Raises:
            ChildExitError: the child exited with an error.
            TerminatedBySignal: a second signal arrived.
        """
        seconds = self._max_drain_seconds
        self._shutdown_requested = self._is_draining = True
        # before the child deregisters itself, which the monitor would take for a foreign deregistration
        self._monitor.stop()
        session.allow_exit()
        if isinstance(loss, ChildExitError):
            return
        child.send(signal.SIGTERM)
        what = "deregisters and ends its requests" if loss is None else "ends its requests, its lease is lost"
        self._log.info(f"drain: dynamo.trtllm {what}, {seconds:.0f} s at the most")
        deadline = self._supervisor.deadline(seconds, "dynamo.trtllm did not end after SIGTERM", "--drain-timeout")
        # the child may wait for an etcd that hangs; then the lost lease is the cause
        with deadline if loss is None else call_if_late(seconds, partial(self._supervisor.abort, loss)):
            event = self._wait_for(ChildExited, SignalReceived)
        if isinstance(event, SignalReceived):
            raise TerminatedBySignal(event.number)
        if isinstance(event, ChildExited) and event.code != 0 and loss is None:
            raise ChildExitError(event.code, event.lines)

    # called from threads

    def _on_time_limit(self, why: str) -> None:
        # ignored once a shutdown is requested
        if not self._shutdown_requested:
            self._shutdown_requested = True
            self._log.info(why)
            self._events.put(SignalReceived(signal.SIGUSR2))

    def _on_signal(self, number: int) -> None:
        self._agent.note_signal(number)
        if number in DRAIN_SIGNALS and self._serving:
            self._on_time_limit(time_limit_reached(number))
            return
        if not self._serving or self._phases.current == "exit":
            self._supervisor.abort(TerminatedBySignal(number), of_signal(number))
        now = time.monotonic()
        if now - self._last_signal > SAME_SIGNAL_SECONDS:
            self._last_signal, self._shutdown_requested = now, True
            self._events.put(SignalReceived(number))

    def _on_child_exit(self, code: int, lines: list[str]) -> None:
        if self._is_draining:
            self._events.put(ChildExited(code, lines))
            return
        if code:
            # for any cause, deregister, so that no further requests arrive
            start_thread(self._instance_lease.revoke)
        # the child may have exited because a rank failed, though not by a signal; then the rank's report is the root cause
        if not self._supervisor.failed.wait(_FIRST_CAUSE_SECONDS if code >= 0 else _KILLED_SECONDS):
            if self._serving and code == 0:
                self._events.put(ChildExited(code, lines))
            else:
                loss = self._monitor.lost_lease_reason() if code == 0 else ""
                ends = () if self._session is None else self._session.ends()
                reason = why_left(ends, self._supervisor.name)
                if not reason and not self._serving:
                    # once it serves, a chain in its output may be that of any request
                    reason = innermost_error(lines)
                self._supervisor.abort(ChildExitError(code, lines, loss, reason), exit_code_for(code))

    def _on_lease_lost(self, error: RetryableError) -> None:
        if self._child is not None and self._child.wait(_LEASE_TO_EXIT_SECONDS):
            return  # the child's exit says more
        if self._serving:
            self._events.put(LeaseLost(error))
        else:
            self._supervisor.abort(error)

    def _on_child_stopped(self, is_stopped: bool) -> None:
        if self._stop_timer is not None:
            self._stop_timer.cancel()
        seconds = self._supervisor.rendezvous.heartbeat_timeout_for(self._phases.current)
        if is_stopped and seconds is not None and self._child is not None:
            error = stopped(seconds, self._child.pid)
            self._stop_timer = threading.Timer(seconds, self._supervisor.abort, (error,))
            self._stop_timer.daemon, self._stop_timer.name = True, "watch"
            self._stop_timer.start()

    def _on_ranks_left(self, ends: Sequence[TaskEnd]) -> None:
        """Abort the world because ranks have left their task, unless the child is exiting, which says more."""
        is_aware = self._serving or any(end.rank == 0 for end in ends)
        if self._child is not None and self._child.wait(_CHILD_FIRST_SECONDS if is_aware else _CHILD_UNAWARE_SECONDS):
            return
        self._supervisor.abort(ranks_left(ends, self._supervisor.name))

    def _on_readiness_event(self, message: dict[str, Any]) -> None:
        if "registered" in message:
            self._instance_lease.resolve(int(message["registered"]))
            self._monitor.start(int(message["registered"]), self._on_lease_lost)
            self._registered = True
            self._events.put(Registered())
        elif "proven" in message:
            if warning := message.get("warning"):
                self._log.warning(str(warning))
            self._events.put(FirstCompletion())
        elif not self._serving and not self._supervisor.failed.wait(_FIRST_CAUSE_SECONDS):
            self._supervisor.abort(readiness_error(message, registered=self._registered))

    def on_exit(self, code: int) -> None:
        """Clean up. A child that is still registered gets time to deregister, which takes milliseconds."""
        if self._finished:
            return
        if self._readiness_probe is not None:
            self._readiness_probe.kill()
        if self._child is not None:
            if not self._instance_lease.is_revoked and self._phases.current not in ("load", "drain"):
                self._child.send(signal.SIGTERM)
                self._child.wait(_DEREGISTER_SECONDS)
            self._child.kill_group()
        self._remove_session_dir()

    def _remove_session_dir(self) -> None:
        if self._session_dir is not None:
            self._session_dir.remove()
