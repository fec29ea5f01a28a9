# SPDX-License-Identifier: Apache-2.0
"""Rank 0's lifecycle with an engine of this project after preflight: load on all ranks, warm up, serve, shut down."""

from __future__ import annotations

import queue
import threading
import time
from typing import TYPE_CHECKING

from dynamo_mpi.common.codec import decode_strings
from dynamo_mpi.common.credentials import clients_environ
from dynamo_mpi.common.errors import DynamoMpiError, EngineError, ExitCode, PhaseTimeoutError
from dynamo_mpi.common.failure import DetectedBy, Failure
from dynamo_mpi.discovery.registration_monitor import RegistrationMonitor
from dynamo_mpi.engines.protocol import GenerationRequest, RequestError, TokenChunk
from dynamo_mpi.mpi.placement import describe_ranks
from dynamo_mpi.runtime.follower import CONTINUE, abort_if_late, build_engine_shard, encode_error, load_engine_shard
from dynamo_mpi.runtime.serving import Registration, run, serve
from dynamo_mpi.runtime.worker_record import remove_ready_file

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from dynamo_mpi.checks.rank_report import RankReport
    from dynamo_mpi.engines.protocol import Engine
    from dynamo_mpi.engines.spec import EngineSpec
    from dynamo_mpi.runtime.worker_hooks import WorkerContext
    from dynamo_mpi.supervisor.signals import ShutdownSignals

_TOKENS = 2  # the second is generated from the KV cache that the first one filled


def run_first_completion(engine: Engine, prompt_token_id: int, timeout: float) -> float:
    """Run one request through a started engine.

    Args:
        engine: started, with nothing in flight.
        prompt_token_id: the prompt, one token.
        timeout: largest duration in seconds.

    Returns:
        The duration in seconds.

    Raises:
        EngineError: the engine refused the request, or ended it without tokens.
        PhaseTimeoutError: the request did not finish in time.
    """
    start = time.monotonic()
    chunks: queue.SimpleQueue[TokenChunk] = queue.SimpleQueue()
    request = GenerationRequest("dynamo_mpi-proof", (prompt_token_id,), max_tokens=_TOKENS)
    try:
        engine.submit(request, chunks.put)
    except RequestError as error:
        raise EngineError(
            f"the engine refused the first request: {error}",
            expected="a prompt of one token that it takes",
            fix="look at max_seq_len and max_num_tokens in the engine config",
        ) from None
    generated = 0
    while True:
        try:
            chunk = chunks.get(timeout=max(0.0, start + timeout - time.monotonic()))
        except queue.Empty:
            raise PhaseTimeoutError(
                f"the first completion took more than {timeout:g} s ({generated} of {_TOKENS} tokens came out)",
                expected="a completion within --warmup-timeout",
                fix="look at the ranks' logs; --warmup-timeout gives it longer",
            ) from None
        generated += len(chunk.token_ids)
        if chunk.finish_reason is not None:
            break
    if chunk.finish_reason in ("error", "cancelled") or generated == 0:
        raise EngineError(
            f"the first completion failed: {chunk.error or chunk.finish_reason}, {generated} tokens",
            expected=f"{_TOKENS} tokens",
            fix="look at the ranks' logs",
        )
    return time.monotonic() - start


_CLOSE_SECONDS = 10.0


class EngineRunner:
    """Runs one worker on rank 0.

    Args:
        worker: rank 0's shared objects.
        signals: end the world before it serves and after it has drained.
        release_ranks: called at the end with the exit code; releases the other ranks.
    """

    def __init__(
        self, worker: WorkerContext, signals: ShutdownSignals, release_ranks: Callable[[ExitCode], None]
    ) -> None:
        self._world, self._launch = worker.rank.world, worker.rank.launch
        self._phases, self._log = worker.rank.phases, worker.rank.log
        self._settings, self._supervisor, self._reports = worker.settings, worker.supervisor, worker.reports
        self._instance_lease, self._signals, self._release_ranks = worker.instance_lease, signals, release_ranks
        self._on_in_flight = worker.hooks.on_requests_in_flight

    def run(self, spec: EngineSpec, token_id: int, on_ready: Callable[[], None]) -> int:
        """Run the worker until SIGTERM or SIGINT.

        Args:
            spec: the engine to build; the other ranks have the same.
            token_id: the prompt of the warmup.
            on_ready: called when the worker accepts requests.

        Returns:
            The exit code, which every other rank has received.

        Raises:
            EngineError: the engine failed; the other ranks may be inside one of its collectives.
            PhaseTimeoutError: the engine exceeded a time limit; likewise.
        """
        deadline = self._supervisor.deadline(self._settings.load_timeout, "not loaded", "--load-timeout")
        with self._phases.enter("load"), deadline:
            code, engine = self._load(spec)
        if engine is None:
            return code
        return self._serve(engine, token_id, on_ready)

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
        """Gather the ranks' errors, and let all ranks continue or stop."""
        with abort_if_late(error, self._supervisor.abort):
            failures = decode_failures(self._world.gather(encode_error(error)))
        if not failures:
            self._world.broadcast(CONTINUE)
            return ExitCode.OK
        text, code = describe_failures(failures, self._reports)
        self._log.error(text)
        self._supervisor.write_failure_files(failures, text)
        self._release_ranks(code)
        return code

    def _serve(self, engine: Engine, token_id: int, on_ready: Callable[[], None]) -> int:
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
        instance_lease = self._instance_lease
        # in a thread, while the requests in flight get the error
        engine.on_failure(lambda _: threading.Thread(target=instance_lease.revoke, daemon=True).start())
        engine.start()
        monitor = RegistrationMonitor(
            settings.endpoint,
            clients_environ(),
            settings.probe_timeout,
            self._log,
            has_failed=self._supervisor.failed.is_set,
        )
        code = ExitCode.OK
        try:
            with self._phases.enter("warmup"):
                run_first_completion(engine, token_id, settings.warmup_timeout)
            with self._signals.in_event_loop():
                run(
                    serve(
                        registration,
                        engine,
                        self._phases,
                        monitor,
                        instance_lease.resolve,
                        on_ready,
                        self._log,
                        self._signals.on_drain_request,
                        self._on_in_flight,
                    )
                )
            instance_lease.revoke_leftover()
        except (EngineError, PhaseTimeoutError):
            # the ranks may be inside the engine's collectives: only an abort reaches them
            raise
        except DynamoMpiError as error:
            self._supervisor.report_orderly_failure(error)
            code = error.exit_code
        finally:
            remove_ready_file(settings.ready_file)
        with self._phases.enter("exit"):
            close(engine, _CLOSE_SECONDS)
            if failures:
                raise EngineError(
                    f"the engine failed: {failures[0]}",
                    expected="an engine whose ranks all run",
                    fix="look at the ranks' logs, and start the worker again",
                )
            self._release_ranks(code)
        self._log.info(f"exit: {'done' if code is ExitCode.OK else f'code {int(code)}'} after {self._phases.age:.1f} s")
        return code


def close(engine: Engine, seconds: float) -> None:
    """Close the engine, which waits for the step that is running.

    Raises:
        PhaseTimeoutError: the engine did not close within ``seconds``, because a rank hangs in a step.
    """
    closing = threading.Thread(target=engine.close, name="close", daemon=True)
    closing.start()
    closing.join(seconds)
    if closing.is_alive():
        raise PhaseTimeoutError(
            f"the engine did not stop within {seconds:g} s",
            expected="all ranks must still execute its steps",
            fix="look for a rank that hangs; the world is ended now",
        )


def decode_failures(reports: Sequence[bytes]) -> list[Failure]:
    """Decode the ranks' reports about loading."""
    failures = []
    for rank, report in enumerate(reports):
        if report:
            code, text = decode_strings(report)
            failures.append(Failure(rank, int(code), text, DetectedBy.REPORT, "load", time.monotonic()))
    return failures


def describe_failures(failures: Sequence[Failure], reports: Sequence[RankReport]) -> tuple[str, ExitCode]:
    """Describe which ranks could not load, each reason once.

    Returns:
        The text, and the exit code of the lowest rank that failed.
    """
    groups: dict[tuple[int, str], list[int]] = {}
    for failure in failures:
        groups.setdefault((failure.exit_code, failure.text), []).append(failure.rank)
    parts = [f"{describe_ranks(ranks, reports)}: {text}" for (_, text), ranks in groups.items()]
    return "error in load: " + "\n".join(parts), ExitCode(failures[0].exit_code)
