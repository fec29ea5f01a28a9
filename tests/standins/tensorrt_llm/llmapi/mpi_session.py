# SPDX-License-Identifier: Apache-2.0
"""Sessions of MPI workers: in the world's rank 0, and from a process outside MPI by way of rank 0."""

from __future__ import annotations

import concurrent.futures
import sys
import threading
import time
import traceback
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import zmq
from mpi4py import MPI
from mpi4py.futures import MPICommExecutor

from tensorrt_llm._environment import reports_worker_death
from tensorrt_llm._utils import mpi_barrier, mpi_rank, mpi_world_size

if TYPE_CHECKING:
    from mpi4py.futures import MPIPoolExecutor

_SYNC_POLL_SECONDS = 0.1
_shared_pool: MPIPoolExecutor | None = None


class MpiSession:
    """Runs a task once on every worker."""

    def submit(self, task: Callable[..., Any], *args: Any, **kwargs: Any) -> list[Future[Any]]:
        """Start it."""
        raise NotImplementedError

    def shutdown(self, wait: bool = True) -> None:
        """Let the workers go."""
        raise NotImplementedError


def validate_session_world_size(session: object, world_size: int) -> None:
    """Raise if a session can't serve a model; the remote client doesn't know its workers, so it isn't checked."""
    workers = getattr(session, "n_workers", None)
    if workers is not None and workers != world_size:
        raise ValueError(f"External MPI session has {workers} workers but the model needs world_size={world_size}.")


class MpiCommSession(MpiSession):
    """All ranks of a communicator; rank 0's task runs in a thread. The others must enter ``MPICommExecutor(comm)``.

    As with the real one nothing waits for them to do so: mpi4py splits ``comm`` in a thread of its own, and a task of rank 0
    that does something collective on ``comm`` before that has ended hangs with it.
    """

    def __init__(self, comm: MPI.Intracomm | None = None, n_workers: int = 1) -> None:
        self.comm, self.n_workers = comm or MPI.COMM_WORLD, n_workers
        if n_workers <= 0:
            raise ValueError(f"n_workers must be non-negative, but got {n_workers}")
        if self.comm.Get_rank() != 0:
            raise RuntimeError(f"only rank 0 can start multi-node session, got {self.comm.Get_rank()}")
        if self.comm.Get_size() != n_workers:
            raise ValueError(
                f"n_workers must be equal to the number of processes in MPI, got {n_workers} vs {self.comm.Get_size()}"
            )
        self._threads: ThreadPoolExecutor | None = ThreadPoolExecutor(max_workers=2)
        self._owns_pool = not (reports_worker_death() and self.comm == MPI.COMM_WORLD)
        self._pool: MPIPoolExecutor | None = self._start_pool()

    def submit(self, task: Callable[..., Any], *args: Any, **kwargs: Any) -> list[Future[Any]]:
        """Start a task on every rank, rank 0's first in the list."""
        assert self._threads is not None, "MPI session not started"
        others = []
        if self.n_workers > 1:
            assert self._pool is not None
            others = [self._pool.submit(task, *args, **kwargs) for _ in range(self.n_workers - 1)]
        return [self._threads.submit(task, *args, **kwargs), *others]

    def shutdown(self, wait: bool = True) -> None:
        """Wait for what runs and release the other ranks; over COMM_WORLD 1.4 does that at exit only."""
        if self._pool is not None and self._owns_pool:
            self._pool.shutdown(wait=wait)
        if self._threads is not None:
            self._threads.shutdown(wait=wait)
        self._pool = self._threads = None

    def abort(self) -> None:
        """End the world."""
        self.comm.Abort(1)

    def __reduce__(self) -> str:
        raise TypeError("cannot pickle MPI session")

    def _start_pool(self) -> MPIPoolExecutor | None:
        global _shared_pool
        if not self._owns_pool and _shared_pool is not None:
            return _shared_pool
        pool = cast("MPIPoolExecutor | None", MPICommExecutor(self.comm).__enter__())
        if not self._owns_pool:
            _shared_pool = pool
        return pool


class RemoteTask(NamedTuple):
    """A task for the server; with ``sync`` its results are sent back."""

    task: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    sync: bool = False


class RemoteWorkerDeath(NamedTuple):
    """A worker's error, of a task whose results aren't sent back."""

    exc_type: str
    message: str

    def to_exception(self) -> RuntimeError:
        """Return it as what the proxy raises."""
        return RuntimeError(f"Remote MPI worker died: {self.exc_type}: {self.message}")


class RemoteMpiCommSessionClient(MpiSession):
    """The session of a process outside MPI. There is one per address, and it is never closed: a PAIR has one peer."""

    _instance: RemoteMpiCommSessionClient | None = None
    addr: str | None = None

    def __new__(cls, addr: str, hmac_key: bytes) -> RemoteMpiCommSessionClient:
        if cls._instance is None or cls._instance.addr != addr:
            cls._instance = super().__new__(cls)
        return cls._instance

    def __init__(self, addr: str, hmac_key: bytes) -> None:
        if self.addr is not None:
            return
        from tensorrt_llm.executor.ipc import ZeroMqQueue

        self.addr = addr
        self._queue = ZeroMqQueue((addr, hmac_key), is_server=False, socket_type=zmq.PAIR, use_hmac_encryption=True)
        self._pending: list[Any] = []

    def submit(self, task: Callable[..., Any], *args: Any, sync: bool = False, **kwargs: Any) -> list[Future[Any]]:
        """Send the task; there are no futures."""
        self._queue.put(RemoteTask(task, args, kwargs, sync))
        return []

    def submit_sync(self, task: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Send the task and wait for what it returns on all ranks, or for an exception, which is returned as well."""
        self.submit(task, *args, sync=True, **kwargs)
        while not (result := self.poll()):
            time.sleep(_SYNC_POLL_SECONDS)
        return result

    def poll(self) -> Any:
        """Return a message of the server, or False."""
        if self._pending:
            return self._pending.pop(0)
        return self._queue.get() if self._queue.poll(0.1) else False

    def check_worker_error(self) -> BaseException | None:
        """Return the error of a worker that the server has reported."""
        while self._queue.poll(0):
            message = self._queue.get()
            if isinstance(message, RemoteWorkerDeath):
                return message.to_exception()
            self._pending.append(message)
        return None

    def shutdown(self, wait: bool = True) -> None:
        """Nothing: the next LLM of this process goes on with it."""


class RemoteMpiCommSessionServer:
    """Rank 0's side: takes tasks from a client, one at a time, and runs each on all ranks."""

    def __init__(
        self,
        hmac_key: bytes | None = None,
        n_workers: int = 0,
        addr: str = "tcp://127.0.0.1:*",
        comm: MPI.Intracomm | None = None,
        is_comm: bool = False,
    ) -> None:
        from tensorrt_llm.executor.ipc import ZeroMqQueue

        if comm is None and not is_comm:
            raise NotImplementedError("the stand-in never spawns: is_comm=True or a comm is needed")
        self.addr = addr
        self.queue = ZeroMqQueue((addr, hmac_key), is_server=True, socket_type=zmq.PAIR, use_hmac_encryption=True)
        self.session = MpiCommSession(comm, n_workers if comm is None else comm.Get_size())
        self.results: list[Any] = []
        self._lock = threading.Lock()

    @staticmethod
    def task_wrapper(task: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Run a task between two barriers: a rank that raises waits in the second for those that don't come."""
        mpi_barrier()
        try:
            return task(*args, **kwargs)
        except Exception:
            print(f"MpiCommSession rank{mpi_rank()} task [{task}] failed", file=sys.stderr, flush=True)
            traceback.print_exc()
            raise
        finally:
            mpi_barrier()

    def serve(self) -> None:
        """Run what comes until None does."""
        pending: list[Future[Any]] = []
        while True:
            if reports_worker_death():
                concurrent.futures.wait(pending)
            message: RemoteTask | None = self.queue.get()
            if message is None:
                self.session.shutdown()
                return
            pending = self.session.submit(self.task_wrapper, message.task, *message.args, **message.kwargs)
            assert len(pending) == mpi_world_size()
            for future in pending:
                if message.sync:
                    future.add_done_callback(self._return_result)
                elif reports_worker_death():
                    future.add_done_callback(self._return_error)

    def _return_result(self, future: Future[Any]) -> None:
        error = future.exception()
        with self._lock:
            if error is not None:
                self.queue.put(error)
                return
            self.results.append(future.result())
            if len(self.results) == self.session.n_workers:
                self.queue.put_noblock(list(self.results), retry=2)
                self.results.clear()

    def _return_error(self, future: Future[Any]) -> None:
        error = future.exception()
        if error is not None:
            with self._lock:
                self.queue.put_noblock(RemoteWorkerDeath(type(error).__name__, str(error)), retry=2)
