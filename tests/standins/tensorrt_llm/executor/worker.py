# SPDX-License-Identifier: Apache-2.0
"""What each rank runs: its part of the reference engine; rank 0 serves the proxy's requests with it."""

from __future__ import annotations

import sys
import threading
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

from dynamo_mpi.engines.protocol import Engine, EngineLimits, RequestError, TokenChunk
from dynamo_mpi.engines.reference.factory import build_reference_engine
from dynamo_mpi.engines.spec import EngineSpec
from tensorrt_llm import _environment, _utils

from .ipc import ZeroMqQueue
from .request import CancellingRequest, Submission
from .utils import WorkerCommIpcAddrs

if TYPE_CHECKING:
    from mpi4py import MPI


class Ready(NamedTuple):
    """Rank 0's engine runs."""

    limits: EngineLimits


class Response(NamedTuple):
    """Something for one request."""

    request_id: str
    chunk: TokenChunk


class EngineDeath(NamedTuple):
    """The engine can't go on."""

    message: str


def load_engine(spec: EngineSpec, comm: MPI.Intracomm) -> Engine:
    """Load this rank's part. Collective."""
    engine = build_reference_engine(spec, comm, _utils.local_mpi_size())
    _environment.suffer_while_loading(int(comm.Get_rank()))
    engine.load()
    return engine


def _leaves(rank: int) -> bool:
    """Whether this rank does what the real one does when its engine can't be built: it writes that down, and returns."""
    if _environment.fault("leave") != rank:
        return False
    print(f"[TRT-LLM] [E] Failed to initialize executor on rank {rank}: stand-in fault", file=sys.stderr, flush=True)
    return True


def worker_main(spec: EngineSpec, worker_queues: WorkerCommIpcAddrs) -> None:
    """Load on all ranks and serve until the proxy says that it is over."""
    # apart from the barriers around the task, in which a rank that fails will wait
    comm = _utils.mpi_comm().Dup()
    if comm.Get_rank() != 0:
        if not _leaves(comm.Get_rank()):
            load_engine(spec, comm).follow()
        return
    status = ZeroMqQueue(worker_queues.worker_init_status_queue_addr, is_server=False, name="worker_init_status")
    try:
        engine = load_engine(spec, comm)
        engine.start()
    except Exception as error:
        # as text: not every exception survives pickling
        status.put(RuntimeError(f"Executor worker returned error: {type(error).__name__}: {error}"))
        status.close()
        raise
    status.put(Ready(engine.limits))
    _serve(engine, worker_queues)
    status.close()


def _serve(engine: Engine, worker_queues: WorkerCommIpcAddrs) -> None:
    requests = ZeroMqQueue(worker_queues.request_queue_addr, is_server=False, name="worker_request")
    results = ZeroMqQueue(worker_queues.result_queue_addr, is_server=False, name="worker_result")
    lock = threading.Lock()  # the engine's thread and this one send

    def send(message: Response | EngineDeath | None) -> None:
        with lock:
            results.put(message)

    def deliver(request_id: str, chunk: TokenChunk) -> None:
        send(Response(request_id, chunk))

    engine.on_failure(lambda error: send(EngineDeath(f"{type(error).__name__}: {error}")))
    while (message := requests.get()) is not None:
        if isinstance(message, CancellingRequest):
            engine.cancel(message.request_id)
        elif isinstance(message, Submission):
            request_id = message.request.request_id
            try:
                engine.submit(message.request, partial(deliver, request_id))
            except RequestError as error:
                send(Response(request_id, TokenChunk((), "error", str(error))))
    engine.close()
    send(None)
    requests.close()
    results.close()
