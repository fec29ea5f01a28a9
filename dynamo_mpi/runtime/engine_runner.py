# SPDX-License-Identifier: Apache-2.0
"""Rank 0's lifecycle with an engine of this project after preflight: load on all ranks, warm up, serve, shut down."""

from __future__ import annotations

import os
import threading
import time
from typing import TYPE_CHECKING

from dynamo_mpi.common.codec import decode_strings
from dynamo_mpi.common.errors import DynamoMpiError, EngineError, PhaseTimeoutError
from dynamo_mpi.common.exit_codes import ExitCode
from dynamo_mpi.common.failure import DetectedBy, Failure
from dynamo_mpi.discovery.registration_monitor import RegistrationMonitor
from dynamo_mpi.engines.warmup import run_first_completion
from dynamo_mpi.mpi.placement import describe_ranks
from dynamo_mpi.runtime.follower import GO, abort_if_late, build_engine_shard, encode_error, load_engine_shard
from dynamo_mpi.runtime.ready_file import remove_ready_file
from dynamo_mpi.runtime.serving import Registration, run, serve

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from dynamo_mpi.checks.rank_report import RankReport
    from dynamo_mpi.engines.protocol import Engine
    from dynamo_mpi.engines.spec import EngineSpec
    from dynamo_mpi.runtime.worker_context import WorkerContext
    from dynamo_mpi.supervisor.shutdown_signals import ShutdownSignals

_CLOSE_SECONDS = 10.0


class EngineRunner:
    """Leads one worker.

    Args:
        worker: what rank 0's parts share.
        signals: end the world until it serves, and once it has drained.
        dismiss: releases the other ranks with this code, once all else is done.
    """

    def __init__(self, worker: WorkerContext, signals: ShutdownSignals, dismiss: Callable[[ExitCode], None]) -> None:
        self._world, self._launch = worker.rank.world, worker.rank.launch
        self._phases, self._log = worker.rank.phases, worker.rank.log
        self._settings, self._guard, self._cards = worker.settings, worker.guard, worker.cards
        self._departure, self._signals, self._dismiss = worker.departure, signals, dismiss
        self._on_in_flight = worker.hooks.on_requests_in_flight

    def run(self, spec: EngineSpec, token_id: int, on_ready: Callable[[], None]) -> int:
        """Live it, until SIGTERM or SIGINT.

        Args:
            spec: what to build; the other ranks have it as well.
            token_id: a token to begin the proof with.
            on_ready: called once requests are answered.

        Returns:
            The exit code, which every other rank has been told.

        Raises:
            EngineError: the engine failed; the other ranks are somewhere inside it.
            PhaseTimeoutError: the same, of one that is late.
        """
        late = self._guard.deadline(self._settings.load_timeout, "not loaded", "--load-timeout")
        with self._phases.enter("load"), late:
            code, engine = self._load(spec)
        if engine is None:
            return code
        return self._lead(engine, token_id, on_ready)

    def _load(self, spec: EngineSpec) -> tuple[ExitCode, Engine | None]:
        engine, error = build_engine_shard(spec, self._world.duplicate(), self._launch.local_size or self._world.size)
        code = self._agree(error)
        if engine is None or code is not ExitCode.OK:
            return code, None
        error = load_engine_shard(engine)
        self._phases.mark_local_done()
        code = self._agree(error)
        return code, engine if code is ExitCode.OK else None

    def _agree(self, error: Exception | None) -> ExitCode:
        """Gather what went wrong anywhere, and tell all ranks to go on or to leave."""
        with abort_if_late(error, self._guard.abort):
            failures = failures_of(self._world.gather(encode_error(error)))
        if not failures:
            self._world.broadcast(GO)
            return ExitCode.OK
        text, code = describe_failures(failures, self._cards)
        self._log.error(text)
        self._guard.write_failure_files(failures, text)
        self._dismiss(code)
        return code

    def _lead(self, engine: Engine, token_id: int, on_ready: Callable[[], None]) -> int:
        settings = self._settings
        registration = Registration(
            model_dir=str(settings.model),
            served_model_name=settings.served_model_name,
            endpoint=settings.endpoint,
            request_plane=settings.request_plane,
            discovery_backend=settings.discovery_backend,
            health_token_id=token_id,
            drain_timeout=settings.drain_timeout,
            role=settings.role,
        )
        failures: list[BaseException] = []
        engine.on_failure(failures.append)
        departure = self._departure
        # what is in flight is told of the failure meanwhile
        engine.on_failure(lambda _: threading.Thread(target=departure.revoke, daemon=True).start())
        engine.start()
        watch = RegistrationMonitor(settings.endpoint, os.environ, settings.probe_timeout, self._log)
        code = ExitCode.OK
        try:
            with self._phases.enter("prove"):
                run_first_completion(engine, token_id, settings.prove_timeout)
            with self._signals.in_event_loop():
                run(
                    serve(
                        registration,
                        engine,
                        self._phases,
                        watch,
                        departure.resolve,
                        on_ready,
                        self._log,
                        self._signals.on_drain_request,
                        self._on_in_flight,
                    )
                )
            departure.revoke_leftover()
        except (EngineError, PhaseTimeoutError):
            # the ranks are somewhere inside the engine's collectives: nothing but an abort reaches them
            raise
        except DynamoMpiError as error:
            self._guard.report_orderly_failure(error)
            code = error.exit_code
        finally:
            remove_ready_file(settings.ready_file)
        with self._phases.enter("exit"):
            close(engine, _CLOSE_SECONDS)
            if failures:
                raise EngineError(
                    f"the engine failed: {failures[0]}", fix="look at the ranks' logs, and start the worker again"
                )
            self._dismiss(code)
        self._log.info(f"exit: {'done' if code is ExitCode.OK else f'code {int(code)}'} after {self._phases.age:.1f} s")
        return code


def close(engine: Engine, seconds: float) -> None:
    """Close the engine, which waits for the step that is running.

    Raises:
        PhaseTimeoutError: it did not close within ``seconds``: a rank hangs in a step.
    """
    closing = threading.Thread(target=engine.close, name="close", daemon=True)
    closing.start()
    closing.join(seconds)
    if closing.is_alive():
        raise PhaseTimeoutError(
            f"the engine did not stop within {seconds:g} s",
            needed="ranks that still take part in its steps",
            fix="look for a rank that hangs; the world is ended now",
        )


def failures_of(reports: Sequence[bytes]) -> list[Failure]:
    """Read what ranks have answered of their loading."""
    failures = []
    for rank, report in enumerate(reports):
        if report:
            code, text = decode_strings(report)
            failures.append(Failure(rank, int(code), text, DetectedBy.REPORT, "load", time.monotonic()))
    return failures


def describe_failures(failures: Sequence[Failure], cards: Sequence[RankReport]) -> tuple[str, ExitCode]:
    """Write down which ranks could not load, and why, each reason once.

    Returns:
        The text, and the exit code of the lowest rank that failed.
    """
    groups: dict[tuple[int, str], list[int]] = {}
    for failure in failures:
        groups.setdefault((failure.exit_code, failure.text), []).append(failure.rank)
    parts = [f"{describe_ranks(ranks, cards)}: {text}" for (_, text), ranks in groups.items()]
    return "error in load: " + "\n".join(parts), ExitCode(failures[0].exit_code)
