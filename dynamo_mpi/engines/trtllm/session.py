# SPDX-License-Identifier: Apache-2.0
"""Serves TensorRT-LLM's session in this world.

``dynamo.trtllm`` sends tasks over TensorRT-LLM's proxy channel; rank 0 runs each of them on all ranks and returns the results. This replaces
TensorRT-LLM's ``mgmn_leader_node`` and ``mgmn_worker_node``, with the same classes for the channel and the executor, but reports at once if
a task fails on any rank, which rank 0 never learns there (K12). docs/concepts/trtllm-session.md lists what this relies on.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import importlib
import inspect
import os
import threading
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dynamo_mpi.common.errors import EngineError
from dynamo_mpi.common.files import SESSION_PREFIX, private_dir
from dynamo_mpi.engines.trtllm.task import Task, TaskEnd, take_own_gpu

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from mpi4py import MPI

# a unix socket's name has at most 107 bytes, including the last part
_MAX_DIR_BYTES = 107 - len("/session")
_POLL_SECONDS = 0.2
# ranks that exit together do so within this time
_LEAVE_SECONDS = 2.0


class SessionDir:
    """A private directory for the session's socket. Directories that killed ranks have left are removed by the next one."""

    def __init__(self) -> None:
        self._held = contextlib.ExitStack()
        self.path = self._make(None)
        if len(os.fsencode(self.path)) > _MAX_DIR_BYTES:
            self.remove()
            self.path = self._make(Path("/tmp"))  # noqa: S108 - a private directory is created in it

    @property
    def address(self) -> str:
        """ZeroMQ address of the socket."""
        return f"ipc://{self.path}/session"

    def remove(self) -> None:
        """Remove the directory. Existing connections stay."""
        self._held.close()

    def _make(self, parent: Path | None) -> str:
        return str(self._held.enter_context(private_dir(parent, prefix=SESSION_PREFIX)))


class Session:
    """Rank 0's side of the session. Creating it is collective: the other ranks call `serve_tasks` with the same communicator. The creating
    thread binds the socket; from `start` on only the session's thread uses it.

    Args:
        comm: a communicator of all ranks that only this session uses.
        address: the address to which the child connects.
        key: HMAC key, 32 bytes.
    """

    def __init__(self, comm: MPI.Intracomm, address: str, key: bytes) -> None:
        RemoteMpiCommSessionServer = import_session().RemoteMpiCommSessionServer
        # with a communicator other than COMM_WORLD, the executor ends with the session in every version
        arguments = {"comm": comm, "addr": address, "is_comm": True, "n_workers": comm.Get_size(), "hmac_key": key}
        if "hmac_key" not in inspect.signature(RemoteMpiCommSessionServer).parameters:
            raise EngineError(
                "this TensorRT-LLM's session has no key: it would run tasks of any process of this node",
                expected="TensorRT-LLM 1.2 or newer",
                fix="use a newer container",
            )
        self._server: Any = RemoteMpiCommSessionServer(**arguments)
        self._size = comm.Get_size()
        self._exit_allowed, self._closing = threading.Event(), threading.Event()
        self._running: list[concurrent.futures.Future[Any]] = []
        # of the running task, in the order in which ranks left it
        self._ends: list[TaskEnd] = []
        self._thread: threading.Thread | None = None

    def start(self, on_left: Callable[[Sequence[TaskEnd]], None], on_failure: Callable[[BaseException], None]) -> None:
        """Start the thread that runs tasks.

        Args:
            on_left: called from that thread when ranks leave a task that has not been allowed to end, in the order in which they left.
            on_failure: called from that thread with an error that stops it.
        """

        def run() -> None:
            try:
                self._serve(on_left)
            except BaseException as error:
                # any error: otherwise the child would wait forever
                on_failure(error)

        self._thread = threading.Thread(target=run, name="session", daemon=True)
        self._thread.start()

    def ends(self) -> tuple[TaskEnd, ...]:
        """Return which ranks have left the running task, in the order in which they did. From any thread."""
        found = list(self._ends)
        for future in self._running:
            # a future that is done may not have called back yet
            if future.done() and not future.cancelled() and future.exception() is None:
                end = future.result()
                found += [end] if isinstance(end, TaskEnd) and end not in found else []
        return tuple(found)

    def allow_exit(self) -> None:
        """From now on, allow ranks to leave their task before others."""
        self._exit_allowed.set()

    def close(self) -> None:
        """Wait until the running tasks have ended on all ranks, and release the ranks from `serve_tasks`."""
        self._exit_allowed.set()
        self._closing.set()
        if self._thread is not None:
            self._thread.join()
        concurrent.futures.wait(self._running)
        self._server.session.shutdown()

    def _serve(self, on_left: Callable[[Sequence[TaskEnd]], None]) -> None:
        # ZeroMQ's sockets are not thread-safe: only this thread uses them
        queue = self._server.queue
        try:
            self._run_tasks(queue, on_left)
        finally:
            queue.close()

    def _run_tasks(self, queue: Any, on_left: Callable[[Sequence[TaskEnd]], None]) -> None:
        while not self._closing.is_set():
            if self._running:
                self._check_early_exits(on_left)
            if not queue.poll(_POLL_SECONDS):
                continue
            message = _receive(queue)
            if message is None:
                # TensorRT-LLM's launcher sends None when its command has exited; here, rank 0 notices that itself
                continue
            # each rank runs one task at a time: wait until all ranks have ended the previous one
            self._finish()
            task = Task(message.task, keeps_result=message.sync)
            self._ends = ends = list[TaskEnd]()
            self._running = list(self._server.session.submit(task, *message.args, **message.kwargs))
            for future in () if message.sync else self._running:
                future.add_done_callback(partial(_note_end, ends))
            if len(self._running) != self._size:
                raise RuntimeError(f"the session ran a task on {len(self._running)} of {self._size} ranks")
            if message.sync and self._finish():
                queue.put([future.result() for future in self._running])
                self._running = []

    def _finish(self) -> bool:
        """Wait for the running tasks; return False if the session is closed before."""
        while not self._closing.is_set():
            late = concurrent.futures.wait(self._running, timeout=_POLL_SECONDS).not_done
            self._raise_load_errors()
            if not late:
                return True
        return False

    def _raise_load_errors(self) -> None:
        """Raise if a rank could not load a task from its bytes. A task that fails later reports that itself.

        Raises:
            EngineError: a task could not be loaded.
        """
        for future in self._running:
            if future.done() and (error := future.exception()) is not None:
                raise EngineError(
                    f"a rank other than 0 could not load a task of dynamo.trtllm: {type(error).__name__}: {error}",
                    expected="the same Python packages and the same model code on all nodes",
                    fix="start all ranks in the same container, with the same HF_HOME or a model folder that contains its code",
                )

    def _check_early_exits(self, on_left: Callable[[Sequence[TaskEnd]], None]) -> None:
        """Report ranks that left a task early: a rank whose engine can't be built only logs that (K12), and the others wait forever."""
        self._raise_load_errors()
        if not any(future.done() for future in self._running) or self._exit_allowed.is_set():
            return
        concurrent.futures.wait(self._running, timeout=_LEAVE_SECONDS)
        self._raise_load_errors()
        if not self._exit_allowed.is_set():
            on_left(self.ends())
            self._running = [future for future in self._running if not future.done()]


def _note_end(ends: list[TaskEnd], future: concurrent.futures.Future[Any]) -> None:
    if not future.cancelled() and future.exception() is None:
        ends.append(future.result())


def _receive(queue: Any) -> Any:
    """Receive a message of the child; rank 0 loads the task in it, too.

    Raises:
        EngineError: it can't be loaded here, or it isn't the child's.
    """
    try:
        return queue.get()
    except (ImportError, AttributeError) as error:
        raise EngineError(
            f"rank 0 could not load a task of dynamo.trtllm: {type(error).__name__}: {error}",
            expected="classes and functions that the ranks can import as dynamo.trtllm can",
            fix="install their package in every rank's environment, or put its folder on PYTHONPATH of the srun or mpirun command",
        ) from None
    except RuntimeError as error:  # a wrong signature
        raise EngineError(
            f"a message to TensorRT-LLM's session can't be used: {error}",
            expected="messages of this worker's dynamo.trtllm",
            fix="start the worker again; if it happens again, look for other processes that use the session's socket in TMPDIR",
        ) from error


def import_session() -> Any:
    """Import TensorRT-LLM's session. Collective (K1): all ranks must call it at the same time.

    Raises:
        EngineError: TensorRT-LLM or one of its dependencies is missing.
    """
    try:
        return importlib.import_module("tensorrt_llm.llmapi.mpi_session")
    except ImportError as error:
        raise EngineError(
            f"TensorRT-LLM can't be imported: {error}",
            expected="TensorRT-LLM and its dependencies in every rank",
            fix="start all ranks in the same container",
        ) from error


def serve_tasks(comm: MPI.Intracomm) -> None:
    """Run the session's tasks on a rank other than 0 until rank 0 closes it. Creating the executor is collective.

    Raises:
        EngineError: TensorRT-LLM or one of its dependencies is missing.
    """
    import_session()
    from mpi4py.futures import MPICommExecutor

    take_own_gpu(comm.Get_rank())
    with MPICommExecutor(comm):
        pass
