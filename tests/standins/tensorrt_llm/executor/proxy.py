# SPDX-License-Identifier: Apache-2.0
"""The engine as the LLM sees it: in the same process, or behind a session of MPI workers."""

from __future__ import annotations

import concurrent.futures
import shutil
import tempfile
import threading
import time
from typing import Protocol

from mpi4py import MPI

from dynamo_mpi.engines.protocol import EngineLimits, GenerationRequest, TokenCallback, TokenChunk
from dynamo_mpi.engines.spec import EngineSpec
from tensorrt_llm._environment import reports_worker_death, seconds_of
from tensorrt_llm.llmapi.mpi_session import MpiSession, RemoteMpiCommSessionClient
from tensorrt_llm.logger import logger

from .ipc import ZeroMqQueue
from .request import CancellingRequest, Submission
from .utils import WorkerCommIpcAddrs
from .worker import EngineDeath, Ready, Response, load_engine, worker_main


class GenerationExecutor(Protocol):
    """What both have in common. ``_fatal_error`` is set when the engine is dead; dynamo.trtllm reads it."""

    limits: EngineLimits
    _fatal_error: BaseException | None

    def submit(self, request: GenerationRequest, callback: TokenCallback) -> None:
        """Start a request."""

    def cancel(self, request_id: str) -> None:
        """End a request soon."""

    def shutdown(self) -> None:
        """End everything. Idempotent."""


class GenerationExecutorWorker:
    """An engine of one rank, in this process."""

    def __init__(self, spec: EngineSpec) -> None:
        self._fatal_error: BaseException | None = None
        self._engine = load_engine(spec, MPI.COMM_SELF)
        self._engine.start()
        self._engine.on_failure(self._fail)
        self.limits = self._engine.limits
        self.submit = self._engine.submit
        self.cancel = self._engine.cancel
        self.shutdown = self._engine.close

    def _fail(self, error: BaseException) -> None:
        self._fatal_error = error


class GenerationExecutorProxy:
    """An engine over the workers of a session.

    The waits for the workers have no limit. Before 1.4 it can't learn of a rank other than 0 that failed.
    """

    def __init__(self, spec: EngineSpec, session: MpiSession) -> None:
        self._fatal_error: BaseException | None = None
        self._session = session
        self._sinks: dict[str, TokenCallback] = {}
        self._lock = threading.Lock()  # of the request queue and the sinks
        self._stopping = threading.Event()
        self._folder = tempfile.mkdtemp(prefix="standin-trtllm-")
        self._requests, self._status, self._results = (
            ZeroMqQueue((f"ipc://{self._folder}/{name}", None), is_server=True, name=name)
            for name in ("request", "init_status", "result")
        )
        queues = WorkerCommIpcAddrs(self._requests.address, self._status.address, self._results.address)
        self._futures: list[concurrent.futures.Future[None]] = session.submit(worker_main, spec, queues)
        self.limits = self._wait_for_init()
        self._threads = [threading.Thread(target=self._dispatch_results, name="proxy_dispatch_result", daemon=True)]
        if reports_worker_death():
            self._threads.append(threading.Thread(target=self._watch_workers, name="proxy_watch", daemon=True))
        for thread in self._threads:
            thread.start()

    def submit(self, request: GenerationRequest, callback: TokenCallback) -> None:
        """Start a request; what the engine has against it comes as a chunk."""
        with self._lock:
            self._sinks[request.request_id] = callback
            self._requests.put(Submission(request))

    def cancel(self, request_id: str) -> None:
        """End a request soon."""
        with self._lock:
            if request_id in self._sinks:
                self._requests.put(CancellingRequest(request_id))

    def shutdown(self) -> None:
        """Let the workers leave their task, and wait for rank 0's message."""
        if self._stopping.is_set():
            return
        self._stopping.set()
        with self._lock:
            self._requests.put(None)
        if self._fatal_error is not None:
            # there will be no answer, and a thread still reads from the result queue
            shutil.rmtree(self._folder, ignore_errors=True)
            return
        for thread in self._threads:
            thread.join()
        concurrent.futures.wait(self._futures)
        self._close()

    def _wait_for_init(self) -> EngineLimits:
        while not self._status.poll(0.1):
            error = self._worker_error()
            if error is not None:
                self._close()
                raise error
        answer, trace, *_ = self._status.get()
        if isinstance(answer, Ready):
            return answer.limits
        logger.error(f"Executor worker initialization error: {trace}")
        self._close()
        time.sleep(seconds_of("STANDIN_TRTLLM_END_SECONDS"))
        assert isinstance(answer, Exception)
        raise RuntimeError("Executor worker returned error") from answer

    def _worker_error(self) -> BaseException | None:
        if any(future.done() for future in self._futures):
            return RuntimeError("Executor worker died during initialization")
        if reports_worker_death() and isinstance(self._session, RemoteMpiCommSessionClient):
            return self._session.check_worker_error()
        return None

    def _dispatch_results(self) -> None:
        while (message := self._results.get()) is not None:
            if isinstance(message, EngineDeath):
                self._fatal_error = RuntimeError(message.message)
            elif isinstance(message, Response):
                with self._lock:
                    ends = message.chunk.finish_reason is not None
                    callback = self._sinks.pop(message.request_id) if ends else self._sinks[message.request_id]
                callback(message.chunk)

    def _watch_workers(self) -> None:
        while not self._stopping.wait(0.5):
            error = self._worker_error()
            if error is not None:
                self._fatal_error = error
                for callback in list(self._sinks.values()):
                    callback(TokenChunk((), "error", str(error)))
                return

    def _close(self) -> None:
        for queue in (self._requests, self._status, self._results):
            queue.close()
        shutil.rmtree(self._folder, ignore_errors=True)
