# SPDX-License-Identifier: Apache-2.0
"""TensorRT-LLM's session over this world.

``dynamo.trtllm`` sends tasks over TensorRT-LLM's proxy channel; rank 0 runs each of them on all ranks and sends the results back. It is what
TensorRT-LLM's own ``mgmn_leader_node`` and ``mgmn_worker_node`` do, with its classes for the channel and the executor, but a task that
fails on any rank is told at once: there, rank 0 never hears of it (K12). docs/trtllm-session.md lists what of
TensorRT-LLM this relies on.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import importlib
import inspect
import os
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dynamo_mpi.common.errors import EngineError
from dynamo_mpi.common.private_dir import private_dir
from dynamo_mpi.engines.trtllm.rank_environment import take_own_gpu
from dynamo_mpi.engines.trtllm.task import Task

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from mpi4py import MPI

# of no run folder, which a user may have beside it
_PREFIX = "dynamo-mpi-session-"
# the name of a unix socket holds 107 bytes, and the last part takes these
_MAX_DIR_BYTES = 107 - len("/session")
_POLL_SECONDS = 0.2
# ranks that end together do so within it
_LEAVE_SECONDS = 2.0


class SessionDir:
    """A folder that nobody else can enter, for the session's socket. What ranks that were killed have left is removed by the next."""

    def __init__(self) -> None:
        self._held = contextlib.ExitStack()
        self.path = self._make(None)
        if len(os.fsencode(self.path)) > _MAX_DIR_BYTES:
            self.remove()
            self.path = self._make(Path("/tmp"))  # noqa: S108 - a folder of our own is made in it

    @property
    def address(self) -> str:
        """ZeroMQ address of the socket."""
        return f"ipc://{self.path}/session"

    def remove(self) -> None:
        """Remove it. Those who are connected stay connected."""
        self._held.close()

    def _make(self, parent: Path | None) -> str:
        return str(self._held.enter_context(private_dir(parent, prefix=_PREFIX)))


class Session:
    """Rank 0's side. Building it is collective: the others call `serve_tasks` with the same communicator. The socket is bound by the
    thread that builds it, and from `start` on belongs to the session's own.

    Args:
        comm: all ranks, for this session alone.
        address: where the child connects.
        key: HMAC key, 32 bytes.
    """

    def __init__(self, comm: MPI.Intracomm, address: str, key: bytes) -> None:
        RemoteMpiCommSessionServer = import_session().RemoteMpiCommSessionServer
        # a communicator that isn't COMM_WORLD itself has an executor that ends with the session, in every version
        arguments = {"comm": comm, "addr": address, "is_comm": True, "n_workers": comm.Get_size(), "hmac_key": key}
        if "hmac_key" not in inspect.signature(RemoteMpiCommSessionServer).parameters:
            raise EngineError(
                "this TensorRT-LLM's session takes no key, and would run whatever any process of this node sends",
                needed="TensorRT-LLM 1.2 or newer",
                fix="use a newer container",
            )
        self._server: Any = RemoteMpiCommSessionServer(**arguments)
        self._size = comm.Get_size()
        self._exit_allowed, self._closing = threading.Event(), threading.Event()
        self._running: list[concurrent.futures.Future[Any]] = []
        self._thread: threading.Thread | None = None

    def start(self, on_left: Callable[[Sequence[int]], None], on_failure: Callable[[BaseException], None]) -> None:
        """Run tasks from now on, in a thread.

        Args:
            on_left: called from that thread with the ranks that ended a task which the others go on with.
            on_failure: called from that thread if it can't go on.
        """

        def run() -> None:
            try:
                self._serve(on_left)
            except BaseException as error:
                # whatever it is: the child would wait for ever
                on_failure(error)

        self._thread = threading.Thread(target=run, name="session", daemon=True)
        self._thread.start()

    def allow_exit(self) -> None:
        """Let ranks leave their task from now on, one after the other."""
        self._exit_allowed.set()

    def close(self) -> None:
        """Wait until the running tasks have ended on all ranks, and release these from `serve_tasks`."""
        self._exit_allowed.set()
        self._closing.set()
        if self._thread is not None:
            self._thread.join()
        concurrent.futures.wait(self._running)
        self._server.session.shutdown()

    def _serve(self, on_left: Callable[[Sequence[int]], None]) -> None:
        # ZeroMQ's sockets belong to one thread: only this one reads and writes
        queue = self._server.queue
        try:
            self._run_tasks(queue, on_left)
        finally:
            queue.close()

    def _run_tasks(self, queue: Any, on_left: Callable[[Sequence[int]], None]) -> None:
        while not self._closing.is_set():
            if self._running:
                self._check_early_exits(on_left)
            if not queue.poll(_POLL_SECONDS):
                continue
            message = queue.get()
            if message is None:
                # TensorRT-LLM's launcher says so when its command has ended; here, rank 0 sees that itself
                continue
            # each rank holds one task at a time: the next waits until all have ended this one
            self._finish()
            task = Task(message.task, keeps_result=message.sync)
            self._running = list(self._server.session.submit(task, *message.args, **message.kwargs))
            if len(self._running) != self._size:
                raise RuntimeError(f"the session ran a task on {len(self._running)} of {self._size} ranks")
            if message.sync and self._finish():
                queue.put([future.result() for future in self._running])
                self._running = []

    def _finish(self) -> bool:
        """Wait for the running tasks; False if the session is closed before."""
        while not self._closing.is_set():
            late = concurrent.futures.wait(self._running, timeout=_POLL_SECONDS).not_done
            self._raise_load_errors()
            if not late:
                return True
        return False

    def _raise_load_errors(self) -> None:
        """A task that fails tells so itself; an exception here is of one that could not even be made from its bytes.

        Raises:
            EngineError: there is one.
        """
        for future in self._running:
            if future.done() and (error := future.exception()) is not None:
                raise EngineError(
                    f"a rank other than 0 could not load a task of dynamo.trtllm: {type(error).__name__}: {error}",
                    needed="the same Python packages, and the same code of the model, on all nodes",
                    fix="start all ranks in the same container, with the same HF_HOME or a model folder that holds its code",
                )

    def _check_early_exits(self, on_left: Callable[[Sequence[int]], None]) -> None:
        """A rank whose engine can't be built logs that and returns, as if it were done (K12); the others wait for it for ever."""
        self._raise_load_errors()
        ended = [future for future in self._running if future.done()]
        if not ended or self._exit_allowed.is_set():
            return
        concurrent.futures.wait(self._running, timeout=_LEAVE_SECONDS)
        if not self._exit_allowed.is_set():
            on_left(sorted(future.result() for future in ended))
            self._running = [future for future in self._running if not future.done()]


def import_session() -> Any:
    """Import TensorRT-LLM's session. A collective of its own (K1), which all ranks have to do at the same time.

    Raises:
        EngineError: TensorRT-LLM, or something that it needs, is missing here.
    """
    try:
        return importlib.import_module("tensorrt_llm.llmapi.mpi_session")
    except ImportError as error:
        raise EngineError(
            f"TensorRT-LLM can't be imported: {error}",
            needed="TensorRT-LLM, and what it needs, in every rank",
            fix="start all ranks in the same container",
        ) from error


def serve_tasks(comm: MPI.Intracomm) -> None:
    """Run the session's tasks on a rank other than 0, until rank 0 closes it. Building the executor is collective.

    Raises:
        EngineError: TensorRT-LLM, or something that it needs, is missing here.
    """
    import_session()
    from mpi4py.futures import MPICommExecutor

    take_own_gpu(comm.Get_rank())
    with MPICommExecutor(comm):
        pass
