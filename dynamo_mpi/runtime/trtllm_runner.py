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

from dynamo_mpi.common.errors import DynamoMpiError, EngineError, RetryableError
from dynamo_mpi.common.exit_codes import ExitCode, of_signal
from dynamo_mpi.common.failure import TerminatedBySignal
from dynamo_mpi.common.hooks import WorkerHook
from dynamo_mpi.common.log import print_trtllm_launch_line
from dynamo_mpi.common.threads import start_thread
from dynamo_mpi.discovery.registration_monitor import RegistrationMonitor
from dynamo_mpi.engines.trtllm.child_command import SessionAddress, child_command, child_environment, drain_seconds
from dynamo_mpi.engines.trtllm.endings import ChildExitError, call_if_late, close_session, proof_error, stopped
from dynamo_mpi.engines.trtllm.events import ChildExited, Event, FirstCompletion, LeaseLost, Registered, SignalReceived
from dynamo_mpi.engines.trtllm.process import TrtllmProcess, exit_code_for
from dynamo_mpi.engines.trtllm.rank_environment import prepare_rank
from dynamo_mpi.engines.trtllm.readiness import ReadinessProbe
from dynamo_mpi.engines.trtllm.session import Session, SessionDir
from dynamo_mpi.engines.trtllm.task import install
from dynamo_mpi.mpi.job_time_limit import TIME_LIMIT_REACHED, schedule_drain
from dynamo_mpi.runtime.ready_file import remove_ready_file
from dynamo_mpi.supervisor.signal_thread import SAME_SIGNAL_SECONDS, SignalThread, signals_of

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from dynamo_mpi.runtime.worker_context import WorkerContext

_KEY_BYTES = 32
# a prefill worker waits this long for its KV transfers
_PREFILL_DRAIN_SECONDS = 30.0
_SHUTDOWN_SECONDS = 30.0
_RELEASE_SECONDS = 60.0
_DEREGISTER_SECONDS = 0.5
_FIRST_CAUSE_SECONDS = 0.5
_KILLED_SECONDS = 0.1
_CHILD_FIRST_SECONDS = 20.0
_CHILD_FIRST_LOADING_SECONDS = 1.0


class TrtllmRunner(WorkerHook):
    """Leads one TensorRT-LLM worker.

    Args:
        worker: what rank 0's parts share.
        gpus_per_node: GPUs, and ranks, of each node.
        token_id: a token to begin the proof with.
    """

    def __init__(self, worker: WorkerContext, gpus_per_node: int, token_id: int) -> None:
        self._world, self._phases, self._log = worker.rank.world, worker.rank.phases, worker.rank.log
        self._settings, self._guard = worker.settings, worker.guard
        self._gpus_per_node, self._token_id = gpus_per_node, token_id
        self._departure, self._signals = worker.departure, signals_of(worker.rank.launch.launcher)
        worker.hooks.add(self)
        self._events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        self._serving = self._asked = self._stopping = self._finished = False
        self._drain_seconds = 0.0
        self._last_signal = -math.inf
        self._registered = False
        settings = worker.settings
        self._watch = RegistrationMonitor(settings.endpoint, os.environ, settings.probe_timeout, self._log, pauses=True)
        self._child: TrtllmProcess | None = None
        self._stop_timer: threading.Timer | None = None
        self._proof: ReadinessProbe | None = None
        self._folder: SessionDir | None = None

    def run(self, on_ready: Callable[[], None]) -> ExitCode:
        """Live it, until SIGTERM, SIGINT, SIGUSR1, a little before the end of the job's time, or the loss of its lease. What else goes wrong
        ends the world from here.

        Args:
            on_ready: called once it is registered and proven.

        Returns:
            The exit code: of a lost lease 75, which has been reported.
        """
        loss: DynamoMpiError | None = None
        signals = SignalThread(self._signalled, self._signals)
        try:
            with self._phases.enter("load"), self._deadline(self._settings.load_timeout):
                child, session = self._start()
                self._wait_for(Registered)
            with (
                self._phases.enter("prove"),
                self._guard.deadline(self._settings.prove_timeout, "no first completion", "--prove-timeout"),
            ):
                self._prove()
            self._forget_folder()
            self._serving = True
            on_ready()
            forget_time = schedule_drain(
                os.environ, self._most_drain_seconds + _RELEASE_SECONDS, self._time_is_up, self._log.warning
            )
            with self._phases.enter("serve"):
                event = self._wait_for(SignalReceived, LeaseLost, ChildExited)
                forget_time()
            with self._phases.enter("drain"):
                loss = self._loss(event)
                self._drain(child, session, loss)
                self._departure.revoke_leftover()
            with self._phases.enter("exit"):
                close_session(session, _RELEASE_SECONDS)
                if loss is not None:
                    self._guard.report_orderly_failure(loss, "serve")
        except TerminatedBySignal as error:
            self._guard.abort(loss or error, exit_code_for(0 if loss else -error.number))
        except ChildExitError as error:
            self._guard.abort(loss or error, exit_code_for(0 if loss else error.code))
        except Exception as error:  # of any kind: the other ranks are somewhere inside the engine
            self._guard.abort(loss or error)
        finally:
            remove_ready_file(self._settings.ready_file)
        signals.close()
        self._finished = True
        return ExitCode.OK if loss is None else ExitCode.TEMPORARY

    def _deadline(self, seconds: float) -> contextlib.AbstractContextManager[None]:
        return self._guard.deadline(seconds, "dynamo.trtllm was not registered", "--load-timeout")

    def _start(self) -> tuple[TrtllmProcess, Session]:
        """Start the child first: it takes as long as the ranks to import the engine, and waits for the session."""
        comm, tasks = self._world.duplicate(), self._world.duplicate()
        install(tasks, self._guard.abort)
        print_trtllm_launch_line("leader", self._world.rank, self._world.size)
        prepare_rank(self._world.rank)
        self._folder = SessionDir()
        key = secrets.token_bytes(_KEY_BYTES)
        child = self._start_child(SessionAddress(self._folder.address, key.hex(), self._world.size))
        session = Session(comm, self._folder.address, key)
        session.start(self._on_ranks_left, self._guard.abort)
        return child, session

    def _start_child(self, address: SessionAddress) -> TrtllmProcess:
        settings = self._settings
        environment = child_environment(os.environ, address, settings)
        child = TrtllmProcess(
            child_command(settings, self._gpus_per_node), environment, self._ended, self._stopped, address.key
        )
        self._drain_seconds = drain_seconds(environment)
        self._child = child
        self._proof = ReadinessProbe(settings, child.pid, self._token_id, environment, self._on_readiness_event)
        return child

    def _prove(self) -> None:
        if self._settings.role == "encode":
            self._log.info("registered; an encode worker answers no completion, so none was asked for")
            return
        self._wait_for(FirstCompletion)

    def _wait_for(self, *kinds: type[Event]) -> Event:
        """Wait for an event of these kinds. Others that come before are of no meaning here."""
        while True:
            event = self._events.get()
            if isinstance(event, kinds):
                return event

    @property
    def _most_drain_seconds(self) -> float:
        """How long the child may take to end."""
        seconds = self._drain_seconds + _SHUTDOWN_SECONDS
        return seconds + _PREFILL_DRAIN_SECONDS if self._settings.role == "prefill" else seconds

    def _loss(self, event: Event) -> DynamoMpiError | None:
        """Return what has gone wrong where an event other than a signal ends the serving: the lease is lost, or the child has ended as if it
        were."""
        if isinstance(event, ChildExited):
            return ChildExitError(event.code, event.lines, self._watch.lost_lease_reason())
        return event.error if isinstance(event, LeaseLost) else None

    def _drain(self, child: TrtllmProcess, session: Session, loss: DynamoMpiError | None) -> None:
        """Have the child deregister, end its requests and its engine.

        Raises:
            EndedError: it ended with an error.
            TerminatedBySignal: a second signal came.
        """
        seconds = self._most_drain_seconds
        self._asked = self._stopping = True
        # before the child deregisters itself: it would take that for somebody else's doing
        self._watch.stop()
        session.allow_exit()
        if isinstance(loss, ChildExitError):
            return
        child.send(signal.SIGTERM)
        what = "deregisters and ends its requests" if loss is None else "ends its requests, its lease is lost"
        self._log.info(f"drain: dynamo.trtllm {what}, {seconds:.0f} s at the most")
        late = self._guard.deadline(seconds, "dynamo.trtllm did not end after SIGTERM", "--drain-timeout")
        # an etcd that hangs may be what the child waits for
        with late if loss is None else call_if_late(seconds, partial(self._guard.abort, loss)):
            event = self._wait_for(ChildExited, SignalReceived)
        if isinstance(event, SignalReceived):
            raise TerminatedBySignal(event.number)
        if isinstance(event, ChildExited) and event.code != 0 and loss is None:
            raise ChildExitError(event.code, event.lines)

    # called from threads

    def _time_is_up(self, why: str) -> None:
        # a warning hurries nobody
        if not self._asked:
            self._asked = True
            self._log.info(why)
            self._events.put(SignalReceived(signal.SIGUSR1))

    def _signalled(self, number: int) -> None:
        self._guard.note_signal(number)
        if number == signal.SIGUSR1 and self._serving:
            self._time_is_up(TIME_LIMIT_REACHED)
            return
        if not self._serving or self._phases.current == "exit":
            self._guard.abort(TerminatedBySignal(number), of_signal(number))
        now = time.monotonic()
        if now - self._last_signal > SAME_SIGNAL_SECONDS:
            self._last_signal, self._asked = now, True
            self._events.put(SignalReceived(number))

    def _ended(self, code: int, lines: list[str]) -> None:
        if self._stopping:
            self._events.put(ChildExited(code, lines))
            return
        if code:
            # whatever the cause, no request must come here any more
            start_thread(self._departure.revoke)
        # a rank that failed may have taken the child along, though not by a signal; its own words are the first cause
        if not self._guard.failed.wait(_FIRST_CAUSE_SECONDS if code >= 0 else _KILLED_SECONDS):
            if self._serving and code == 0:
                self._events.put(ChildExited(code, lines))
            else:
                loss = self._watch.lost_lease_reason() if code == 0 else ""
                self._guard.abort(ChildExitError(code, lines, loss), exit_code_for(code))

    def _lost(self, error: RetryableError) -> None:
        if self._child is not None and self._child.wait(_FIRST_CAUSE_SECONDS):
            return  # its own end tells more
        if self._serving:
            self._events.put(LeaseLost(error))
        else:
            self._guard.abort(error)

    def _stopped(self, is_stopped: bool) -> None:
        if self._stop_timer is not None:
            self._stop_timer.cancel()
        seconds = self._guard.rendezvous.heartbeat_timeout_for(self._phases.current)
        if is_stopped and seconds is not None and self._child is not None:
            error = stopped(seconds, self._child.pid)
            self._stop_timer = threading.Timer(seconds, self._guard.abort, (error,))
            self._stop_timer.daemon, self._stop_timer.name = True, "watch"
            self._stop_timer.start()

    def _on_ranks_left(self, ranks: Sequence[int]) -> None:
        """End the world because ranks have left their task, unless the child is what ends: it closes its engine before it ends itself."""
        if self._child is not None and self._child.wait(
            _CHILD_FIRST_SECONDS if self._serving else _CHILD_FIRST_LOADING_SECONDS
        ):
            return
        self._guard.abort(
            EngineError(
                f"{self._guard.name(ranks)} left TensorRT-LLM's worker while dynamo.trtllm goes on",
                needed="all ranks in it until dynamo.trtllm ends",
                fix="what that rank has written last says why: TensorRT-LLM logs such an error there and returns",
            )
        )

    def _on_readiness_event(self, news: dict[str, Any]) -> None:
        if "registered" in news:
            self._departure.resolve(int(news["registered"]))
            self._watch.start(int(news["registered"]), self._lost)
            self._registered = True
            self._events.put(Registered())
        elif "proven" in news:
            self._events.put(FirstCompletion())
        elif not self._serving and not self._guard.failed.wait(_FIRST_CAUSE_SECONDS):
            self._guard.abort(proof_error(news, registered=self._registered))

    def on_exit(self, code: int) -> None:
        """Leave nothing behind: a child that is still registered gets the time to deregister, which takes milliseconds."""
        if self._finished:
            return
        if self._proof is not None:
            self._proof.kill()
        if self._child is not None:
            if not self._departure.is_revoked and self._phases.current not in ("load", "drain"):
                self._child.send(signal.SIGTERM)
                self._child.wait(_DEREGISTER_SECONDS)
            self._child.kill_group()
        self._forget_folder()

    def _forget_folder(self) -> None:
        if self._folder is not None:
            self._folder.remove()
