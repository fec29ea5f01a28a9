# SPDX-License-Identifier: Apache-2.0
"""The worker as a Dynamo endpoint: register, serve, drain.

If ``serve_endpoint`` returns by itself, the runtime has lost its lease and shut down without an error. This module raises one, because a
worker that is no longer registered must not exit as if it had finished. The registration monitor detects what the runtime doesn't notice.
"""

from __future__ import annotations

import asyncio
import os
import signal
import time
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

from dynamo_mpi.common.credentials import export_secrets
from dynamo_mpi.common.errors import EngineError
from dynamo_mpi.common.process import DRAIN_SIGNALS
from dynamo_mpi.discovery.registration_monitor import lease_error
from dynamo_mpi.layout.format import counted
from dynamo_mpi.mpi.job_time_limit import schedule_drain, time_limit_reached
from dynamo_mpi.runtime.serving_handler import RequestHandler, RuntimeErrors, runtime_error

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine

    from dynamo_mpi.common.errors import RetryableError
    from dynamo_mpi.common.log import RankLogger
    from dynamo_mpi.common.phases import PhaseTracker
    from dynamo_mpi.discovery.registration_monitor import RegistrationMonitor
    from dynamo_mpi.engines.protocol import Engine

_T = TypeVar("_T")
# a shutdown's time besides the drain: deregistration, the engine's last step, the ranks' last barrier
_END_SECONDS = 30.0
_POLL_SECONDS = 0.02
# frontends need this time to notice the deregistration; after it the last requests have arrived
_PROPAGATION_SECONDS = 0.2
_SHUTDOWN_SECONDS = 5.0
_REGISTER_SECONDS = 60.0


@dataclass(frozen=True)
class Registration:
    """The worker's registration in Dynamo.

    Args:
        model_dir: directory with config.json and the tokenizer's files.
        served_model_name: the model name that clients use.
        endpoint: ``dyn://namespace.component.endpoint``.
        request_plane: ``"tcp"`` or ``"nats"``.
        discovery_backend: ``"etcd"``.
        health_token_id: a token for the runtime's own health checks.
        drain_timeout: seconds that requests in flight may take after a signal.
        role: ``"agg"``, ``"prefill"`` or ``"decode"``.
    """

    model_dir: str
    served_model_name: str
    endpoint: str
    request_plane: str
    discovery_backend: str
    health_token_id: int
    drain_timeout: float
    role: str = "agg"


def health_payload(token_id: int) -> dict[str, Any]:
    """Return the runtime's health check request: without one, ``/health`` never becomes ready."""
    return {
        "token_ids": [token_id],
        "stop_conditions": {"max_tokens": 1, "ignore_eos": True},
        "sampling_options": {"temperature": 0.0},
        "_HEALTH_CHECK": True,
    }


async def serve(
    registration: Registration,
    engine: Engine,
    phases: PhaseTracker,
    monitor: RegistrationMonitor,
    on_registered: Callable[[int], object],
    on_ready: Callable[[], None],
    log: RankLogger,
    on_drain_request: Callable[[Callable[[int], object]], object],
    on_in_flight: Callable[[int], object] = lambda _: None,
) -> None:
    """Register ``engine`` with Dynamo, serve until SIGTERM, SIGINT, SIGUSR2 or shortly before the job's time limit, then drain.

    Args:
        registration: the registration's data.
        engine: the engine, started and warmed up.
        phases: records ``register``, ``serve`` and ``drain``.
        monitor: monitors the registration.
        on_registered: called from a thread with the instance's id after it is registered.
        on_ready: called when requests are accepted.
        log: the worker's log.
        on_drain_request: registers the function that is called, from any thread, with the signal that requests the drain.
        on_in_flight: called with the number of requests in flight, initially and at each change.

    Raises:
        EngineError: the engine failed.
        RetryableError: the worker's lease was lost.
    """
    from dynamo.llm.exceptions import EngineShutdown, InvalidArgument, Unknown
    from dynamo.runtime import DistributedRuntime

    loop = asyncio.get_running_loop()
    stop: asyncio.Future[int] = loop.create_future()
    failed: asyncio.Future[BaseException] = loop.create_future()
    lost: asyncio.Future[RetryableError] = loop.create_future()
    engine.on_failure(lambda error: _from_thread(loop, failed, error))
    handler = RequestHandler(
        engine, RuntimeErrors(InvalidArgument, EngineShutdown, Unknown), registration.role, on_in_flight
    )
    on_in_flight(handler.in_flight)

    reasons: list[str] = []

    def request_drain(number: int) -> None:
        if number in DRAIN_SIGNALS and not stop.done() and not reasons:
            log.info(time_limit_reached(number))
        _from_thread(loop, stop, number)

    def drain_because(reason: str) -> None:
        if not stop.done():
            log.info(reason)
        reasons.append(reason)
        # as a signal, so that the next signal counts as the second
        os.kill(os.getpid(), signal.SIGUSR2)
        # directly too: a signal that follows another within a second is ignored
        _from_thread(loop, stop, signal.SIGUSR2)

    on_drain_request(request_drain)

    with phases.enter("register"):
        export_secrets()
        try:
            runtime = DistributedRuntime(loop, registration.discovery_backend, registration.request_plane)
            endpoint = runtime.endpoint(registration.endpoint)
        except Exception as error:  # the runtime has no finer exception types
            raise runtime_error(error) from error
        serving = asyncio.ensure_future(
            endpoint.serve_endpoint(
                handler.generate,
                graceful_shutdown=True,
                metrics_labels=[("model", registration.served_model_name)],
                health_check_payload=health_payload(registration.health_token_id),
            )
        )
        registering = asyncio.ensure_future(_register_model(registration, engine, endpoint))
        await _first_of(registering, serving, failed, stop, timeout=_REGISTER_SECONDS)
        failure = _first_exception(registering, serving)
        if failure is not None or not (registering.done() or failed.done() or stop.done()):
            registering.cancel()
            await _shut_down(runtime, serving)
            raise runtime_error(failure or TimeoutError(f"no answer within {_REGISTER_SECONDS:g} s")) from failure
        if registering.done() and not (stop.done() or failed.done()):
            # the model's card may be registered before the runtime has bound its port: this waits for the instance, a second at most
            await asyncio.to_thread(on_registered, endpoint.connection_id())
    if registering.done() and not (stop.done() or failed.done() or serving.done()):
        monitor.start(endpoint.connection_id(), partial(_from_thread, loop, lost))
        on_ready()
    needed = registration.drain_timeout + _END_SECONDS
    cancel_drain = schedule_drain(os.environ, needed, drain_because, log.warning)
    with phases.enter("serve"):
        await _first_of(serving, failed, stop, lost)
        cancel_drain()
        registering.cancel()
        # before the deregistration, which the monitor would take for a foreign one
        await asyncio.to_thread(monitor.stop)
        if failed.done():
            await _deregister(endpoint)
            await _cancel_in_flight(handler, log)
            await _shut_down(runtime, serving)
            raise _engine_error("while serving", failed.result())
        if serving.done() and not (stop.done() or lost.done()):
            await _deregister(endpoint)
            if (failure := _first_exception(serving)) is not None:
                raise runtime_error(failure) from failure
            raise lease_error(
                await asyncio.to_thread(monitor.lost_lease_reason) or "the Dynamo runtime has ended by itself"
            )
    with phases.enter("drain"):
        loss = lost.result() if lost.done() and not stop.done() else None
        # without a lease there is nothing to deregister
        gone = loss is not None or await _deregister(endpoint)
        how = "deregistered" if gone else "not deregistered, etcd does not answer: its keys go when the lease ends"
        if loss is not None:
            how = "this worker's lease is lost"
        log.info(f"drain: {how}, {counted(handler.in_flight, 'request')} in flight")
        await asyncio.sleep(_PROPAGATION_SECONDS)
        drained = asyncio.ensure_future(_drained(handler, engine, registration.drain_timeout))
        await _first_of(drained, failed)
        drained.cancel()
        await _cancel_in_flight(handler, log)
        await _shut_down(runtime, serving)
        if failed.done():
            raise _engine_error("while draining", failed.result())
        if loss is not None:
            raise loss


async def _cancel_in_flight(handler: RequestHandler, log: RankLogger) -> None:
    if handler.in_flight:
        log.warning(f"requests cut off at the end of the drain: {handler.in_flight}; each ends with an error")
        handler.cut_off_all()
        await handler.wait_idle(_PROPAGATION_SECONDS * 5)


def _engine_error(when: str, cause: BaseException) -> EngineError:
    error = EngineError(
        f"the engine failed {when}: {cause or type(cause).__name__}",
        expected="an engine whose ranks all run",
        fix="look at the ranks' logs, and start the worker again",
    )
    error.__cause__ = cause
    return error


async def _drained(handler: RequestHandler, engine: Engine, seconds: float) -> None:
    """Wait, at most ``seconds``, until no request is in flight and no KV transfer is pending."""
    deadline = time.monotonic() + seconds
    if await handler.wait_idle(seconds):
        while engine.pending_kv_transfers and time.monotonic() < deadline:
            await asyncio.sleep(_POLL_SECONDS)


async def _shut_down(runtime: Any, serving: asyncio.Future[Any]) -> None:
    runtime.shutdown()
    await asyncio.wait({serving}, timeout=_SHUTDOWN_SECONDS)
    # retrieve the exception; otherwise asyncio logs it in the middle of the report
    _first_exception(serving)


def _first_exception(*futures: asyncio.Future[Any]) -> BaseException | None:
    """Return the first exception of the futures that are done."""
    ended = [future for future in futures if future.done() and not future.cancelled()]
    return next((error for future in ended if (error := future.exception()) is not None), None)


def run(coroutine: Coroutine[Any, Any, None]) -> None:
    """Run ``coroutine``, on uvloop if it is installed, as all of Dynamo's own workers do."""
    try:
        import uvloop
    except ImportError:
        asyncio.run(coroutine)
    else:
        uvloop.run(coroutine)


async def _register_model(registration: Registration, engine: Engine, endpoint: Any) -> None:
    from dynamo.llm import ModelInput, ModelRuntimeConfig, ModelType, WorkerType, register_model

    model_type, worker_type, needs = {
        "agg": (ModelType.Chat | ModelType.Completions, WorkerType.Aggregated, []),
        "prefill": (ModelType.Prefill, WorkerType.Prefill, [[WorkerType.Decode]]),
        "decode": (ModelType.Chat | ModelType.Completions, WorkerType.Decode, [[WorkerType.Prefill]]),
    }[registration.role]
    limits = engine.limits
    config = ModelRuntimeConfig()
    config.context_length = limits.context_length
    config.total_kv_blocks = limits.total_kv_blocks
    config.max_num_seqs = limits.max_batch_size
    config.max_num_batched_tokens = limits.max_num_tokens
    await register_model(
        ModelInput.Tokens,
        model_type,
        endpoint,
        registration.model_dir,
        registration.served_model_name,
        kv_cache_block_size=limits.kv_block_size,
        runtime_config=config,
        worker_type=worker_type,
        needs=needs,
    )


async def _deregister(endpoint: Any) -> bool:
    """Deregister the worker: the model first, so that the model of a single worker disappears too. Return whether it worked."""
    from dynamo.llm import unregister_model

    gone = True
    for unregister in (lambda: unregister_model(endpoint), endpoint.unregister_endpoint_instance):
        try:
            await asyncio.wait_for(unregister(), _SHUTDOWN_SECONDS)
        except Exception:  # after any error of the runtime: its lease ends with the process
            gone = False
    return gone


async def _first_of(*futures: asyncio.Future[Any], timeout: float | None = None) -> None:
    await asyncio.wait(futures, timeout=timeout, return_when=asyncio.FIRST_COMPLETED)


def _from_thread(loop: asyncio.AbstractEventLoop, future: asyncio.Future[_T], result: _T) -> None:
    def deliver() -> None:
        if not future.done():
            future.set_result(result)

    loop.call_soon_threadsafe(deliver)
