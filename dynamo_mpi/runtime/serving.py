# SPDX-License-Identifier: Apache-2.0
"""The worker as a Dynamo endpoint: register, serve, drain.

A ``serve_endpoint`` that returns by itself means that the runtime has lost its lease and shut down, without an error: here it
becomes one, since a worker that nobody can find must not look like one that has finished. What the runtime doesn't notice, the watch
over the registration does.
"""

from __future__ import annotations

import asyncio
import os
import signal
import time
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

from dynamo_mpi.common.errors import EngineError
from dynamo_mpi.discovery.registration_monitor import lease_error
from dynamo_mpi.discovery.runtime_compat import remove_empty_credentials
from dynamo_mpi.mpi.job_time_limit import TIME_LIMIT_REACHED, schedule_drain
from dynamo_mpi.runtime.runtime_error import runtime_error
from dynamo_mpi.runtime.serving_handler import RequestHandler

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine

    from dynamo_mpi.common.errors import RetryableError
    from dynamo_mpi.common.log import RankLogger
    from dynamo_mpi.common.phases import PhaseTracker
    from dynamo_mpi.discovery.registration_monitor import RegistrationMonitor
    from dynamo_mpi.engines.protocol import Engine

_T = TypeVar("_T")
# what an end takes beside its drain: the deregistration, the engine's last step, the ranks' parting
_END_SECONDS = 30.0
_LOOK_SECONDS = 0.02
# time for frontends to see that the instance has gone, before its last requests are counted
_FAREWELL_SECONDS = 0.2
_SHUTDOWN_SECONDS = 5.0
_REGISTER_SECONDS = 60.0


@dataclass(frozen=True)
class Registration:
    """How the worker appears in Dynamo.

    Args:
        model_dir: folder with config.json and the tokenizer's files.
        served_model_name: what clients ask for.
        endpoint: ``dyn://namespace.component.endpoint``.
        request_plane: ``"tcp"`` or ``"nats"``.
        discovery_backend: ``"etcd"``.
        health_token_id: a token for the runtime's own health checks.
        drain_timeout: seconds for requests in flight after a signal.
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
    """Return the request by which the runtime asks whether the engine still makes tokens: without one, ``/health`` never turns ready."""
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
    watch: RegistrationMonitor,
    on_registered: Callable[[int], object],
    on_ready: Callable[[], None],
    log: RankLogger,
    expect_stop: Callable[[Callable[[int], object]], object],
    on_in_flight: Callable[[int], object] = lambda _: None,
) -> None:
    """Register ``engine`` with Dynamo, and serve until SIGTERM, SIGINT, SIGUSR1 or a little before the end of the job's time; then drain.

    Args:
        registration: how it appears.
        engine: started and proven.
        phases: gets ``register``, ``serve`` and ``drain``.
        watch: over the registration.
        on_registered: called from a thread with the instance's id, as soon as it is in discovery.
        on_ready: called once requests are answered.
        log: the worker's log.
        expect_stop: called with what to call, from any thread, with the signal that asks for the drain.
        on_in_flight: called with the number of requests in flight: at first, and when it changes.

    Raises:
        EngineError: the engine failed.
        RetryableError: the worker's lease was lost.
    """
    from dynamo.llm.exceptions import EngineShutdown, InvalidArgument
    from dynamo.runtime import DistributedRuntime

    loop = asyncio.get_running_loop()
    stop: asyncio.Future[int] = loop.create_future()
    failed: asyncio.Future[BaseException] = loop.create_future()
    lost: asyncio.Future[RetryableError] = loop.create_future()
    engine.on_failure(lambda error: _from_thread(loop, failed, error))
    handler = RequestHandler(engine, InvalidArgument, EngineShutdown, registration.role, on_in_flight)
    on_in_flight(handler.in_flight)

    reasons: list[str] = []

    def ask_to_stop(number: int) -> None:
        if number == signal.SIGUSR1 and not stop.done() and not reasons:
            log.info(TIME_LIMIT_REACHED)
        _from_thread(loop, stop, number)

    def end_for(reason: str) -> None:
        if not stop.done():
            log.info(reason)
        reasons.append(reason)
        # by a signal, so that the next one is the second
        os.kill(os.getpid(), signal.SIGUSR1)
        # which not every launch takes
        _from_thread(loop, stop, signal.SIGUSR1)

    expect_stop(ask_to_stop)

    with phases.enter("register"):
        try:
            runtime = DistributedRuntime(loop, registration.discovery_backend, registration.request_plane)
            endpoint = runtime.endpoint(registration.endpoint)
        except Exception as error:  # the runtime has no finer type for any of its troubles
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
        trouble = _trouble(registering, serving)
        if trouble is not None or not (registering.done() or failed.done() or stop.done()):
            registering.cancel()
            await _end(runtime, serving)
            raise runtime_error(trouble or TimeoutError(f"no answer within {_REGISTER_SECONDS:g} s")) from trouble
    if registering.done() and not stop.done() and not failed.done():
        await asyncio.to_thread(on_registered, endpoint.connection_id())
        watch.start(endpoint.connection_id(), partial(_from_thread, loop, lost))
        on_ready()
    needed = registration.drain_timeout + _END_SECONDS
    forget_time = schedule_drain(os.environ, needed, end_for, log.warning)
    with phases.enter("serve"):
        await _first_of(serving, failed, stop, lost)
        forget_time()
        registering.cancel()
        # before we deregister ourselves: it would take that for somebody else's doing
        await asyncio.to_thread(watch.stop)
        if failed.done():
            await _deregister(endpoint)
            await _cut_off(handler, log)
            await _end(runtime, serving)
            raise _engine_error("while serving", failed.result())
        if serving.done() and not (stop.done() or lost.done()):
            await _deregister(endpoint)
            if (trouble := _trouble(serving)) is not None:
                raise runtime_error(trouble) from trouble
            raise lease_error(
                await asyncio.to_thread(watch.lost_lease_reason) or "the Dynamo runtime has ended by itself"
            )
    with phases.enter("drain"):
        loss = lost.result() if lost.done() and not stop.done() else None
        # without a lease there is nothing to take out
        gone = loss is not None or await _deregister(endpoint)
        how = "deregistered" if gone else "not deregistered, etcd does not answer: its keys go when the lease ends"
        if loss is not None:
            how = "this worker's lease is lost"
        log.info(f"drain: {how}, {handler.in_flight} requests in flight")
        await asyncio.sleep(_FAREWELL_SECONDS)
        drained = asyncio.ensure_future(_drained(handler, engine, registration.drain_timeout))
        await _first_of(drained, failed)
        drained.cancel()
        await _cut_off(handler, log)
        await _end(runtime, serving)
        if failed.done():
            raise _engine_error("while draining", failed.result())
        if loss is not None:
            raise loss


async def _cut_off(handler: RequestHandler, log: RankLogger) -> None:
    if handler.in_flight:
        log.info(f"{handler.in_flight} requests are cut off")
        handler.cancel_all()
        await handler.wait_quiet(_FAREWELL_SECONDS * 5)


def _engine_error(when: str, cause: BaseException) -> EngineError:
    error = EngineError(f"the engine failed {when}: {cause or type(cause).__name__}")
    error.__cause__ = cause
    return error


async def _drained(handler: RequestHandler, engine: Engine, seconds: float) -> None:
    """Wait, no longer than ``seconds``, until no request is in flight and no decode worker needs this one's KV."""
    deadline = time.monotonic() + seconds
    if await handler.wait_quiet(seconds):
        while engine.unfetched and time.monotonic() < deadline:
            await asyncio.sleep(_LOOK_SECONDS)


async def _end(runtime: Any, serving: asyncio.Future[Any]) -> None:
    runtime.shutdown()
    await asyncio.wait({serving}, timeout=_SHUTDOWN_SECONDS)
    # fetched, or asyncio complains of it in the middle of our own report
    _trouble(serving)


def _trouble(*futures: asyncio.Future[Any]) -> BaseException | None:
    """Return the first exception that one of ``futures`` has ended with."""
    ended = [future for future in futures if future.done() and not future.cancelled()]
    return next((error for future in ended if (error := future.exception()) is not None), None)


def run(coroutine: Coroutine[Any, Any, None]) -> None:
    """Run ``coroutine`` to its end, on uvloop where it is installed, as all of Dynamo's own workers do."""
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
    """Take the worker out of discovery: the model first, so that a lone worker's model disappears with it. Tell whether it worked."""
    from dynamo.llm import unregister_model

    gone = True
    for withdraw in (lambda: unregister_model(endpoint), endpoint.unregister_endpoint_instance):
        try:
            await asyncio.wait_for(withdraw(), _SHUTDOWN_SECONDS)
        except Exception:  # whatever the runtime raises here, its lease goes with the process
            gone = False
    return gone


async def _first_of(*futures: asyncio.Future[Any], timeout: float | None = None) -> None:
    await asyncio.wait(futures, timeout=timeout, return_when=asyncio.FIRST_COMPLETED)


def _from_thread(loop: asyncio.AbstractEventLoop, future: asyncio.Future[_T], result: _T) -> None:
    def deliver() -> None:
        if not future.done():
            future.set_result(result)

    loop.call_soon_threadsafe(deliver)


def export_runtime_env(etcd: list[str]) -> None:
    """Tell the Dynamo runtime, which reads its environment, which etcd endpoints to try, living ones first."""
    os.environ["ETCD_ENDPOINTS"] = ",".join(etcd)
    server = os.environ.pop("NATS_SERVER", "")
    # empty is how a batch script says "none"; the runtime takes it for an address, and wants to see a scheme
    if server:
        os.environ["NATS_SERVER"] = server if "://" in server else f"nats://{server}"
    remove_empty_credentials(os.environ)
