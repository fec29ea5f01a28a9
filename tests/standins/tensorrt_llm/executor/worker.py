# SPDX-License-Identifier: Apache-2.0
"""What each rank runs: its part of the reference engine; rank 0 serves the proxy's requests with it."""

from __future__ import annotations

import os
import pickle
import threading
import time
import traceback
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

from dynamo_mpi.engines.protocol import Engine, EngineLimits, RequestError, TokenChunk
from dynamo_mpi.engines.reference.factory import build_reference_engine
from dynamo_mpi.engines.spec import EngineSpec
from tensorrt_llm import _compiling, _environment, _utils
from tensorrt_llm.logger import logger

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
    _compiling.compile_kernels(int(comm.Get_rank()))
    engine.load()
    return engine


def _portable(error: Exception) -> Exception:
    try:
        pickle.dumps(error)
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error


def worker_main(spec: EngineSpec, worker_queues: WorkerCommIpcAddrs) -> None:
    """Load on all ranks and serve until the proxy says that it is over. A rank that can't load logs that, and returns."""
    # apart from the barriers around the task, in which a rank that fails will wait
    comm = _utils.mpi_comm().Dup()
    rank = int(comm.Get_rank())
    _environment.configure_cpu_affinity()
    _environment.suffer_before_loading(rank)
    status = None
    if rank == 0:
        status = ZeroMqQueue(worker_queues.worker_init_status_queue_addr, is_server=False, name="worker_init_status")
    identities = comm.allgather(os.getpid())
    try:
        engine = load_engine(spec, comm)
    except Exception as error:
        logger.error(f"Failed to initialize executor on rank {rank}: {error}")
        logger.error(traceback.format_exc())
        if status is not None:
            status.put((_portable(error), traceback.format_exc()))
            status.close()
        return
    for kind in ("crash", "stick"):
        if _environment.strikes(kind, rank):
            threading.Thread(target=_hard_kill, args=(kind, comm.Get_size()), daemon=True).start()
    if status is None:
        engine.follow()
        return
    engine.start()
    status.put((Ready(engine.limits), None, identities))
    _serve(engine, worker_queues)
    status.close()


def _hard_kill(kind: str, size: int) -> None:
    """End all ranks as the real one does, in a thread of its own."""
    time.sleep(1.0)
    if kind == "stick":
        logger.error("Hang detected after 300 seconds.")
    else:
        try:
            raise RuntimeError("stand-in fault: illegal memory access")
        except RuntimeError:
            logger.error(traceback.format_exc())
        logger.error(f"Executor loop crashed on this rank; hard-killing all {size} ranks in 10s")
    logger.error("HangDetector: propagating hard-kill to all ranks via MPI_Abort.")
    _utils.mpi_comm().Abort(137)


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
