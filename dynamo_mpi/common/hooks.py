# SPDX-License-Identifier: Apache-2.0
"""The hook interface of rank 0's lifecycle (worker record, metrics, health, timeline ...); each hook is a module of its own.

To add a hook, subclass `WorkerHook`, override the methods that it needs, and add it where rank 0 creates the others (`worker_hooks`).
"""

from __future__ import annotations

import threading
import time
from functools import partial
from operator import methodcaller

from dynamo_mpi.common.light_typing import TYPE_CHECKING, Any, NamedTuple
from dynamo_mpi.common.waiting import start_thread

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from dynamo_mpi.common.failure import Failure
    from dynamo_mpi.common.phases import PhaseProgress


class WorldFailure(NamedTuple):
    """The failures that end a world.

    Args:
        failures: the root cause, then its consequences.
        host: the host of the root cause.
        report: the logged report.
    """

    failures: Sequence[Failure]
    host: str
    report: str

    @property
    def first(self) -> Failure:
        """The root cause."""
        return self.failures[0]


class WorkerHook:
    """An observer of a worker's lifecycle. Every method does nothing by default.

    Unless noted otherwise, a method is called in the thread of the event and must be quick. An exception is logged once as a warning and
    has no other effect.
    """

    def on_phase(self, phase: str) -> None:
        """Called when a phase begins, possibly in a signal handler."""

    def on_progress(self, progress: PhaseProgress) -> None:
        """Called every 2 s in long phases with the ranks' progress, in a thread of the progress reporter."""

    def on_hardware_checked(self, figures: dict[str, Any]) -> None:
        """Called when the hardware checks have passed; ``figures`` as in the worker record."""

    def on_staged(self, figures: dict[str, Any]) -> None:
        """Called when all nodes have a copy of the model; ``figures`` as in the worker record."""

    def on_caches(self, figures: dict[str, Any]) -> None:
        """Called when the ranks' compile caches have been seeded or not, and when they have been written back, then in a thread; ``figures``
        as in the worker record."""

    def on_registered(self, lease: int) -> None:
        """Called when Dynamo's runtime has registered the worker; the lease id is also the instance id."""

    def on_ready(self) -> None:
        """Called when the worker accepts requests, after a completion over all ranks."""

    def on_requests_in_flight(self, count: int) -> None:
        """Called when the number of requests in flight has changed."""

    def on_failure_detected(self) -> None:
        """Called when a failure is detected, before its cause is known. In a thread of its own, for at most 1 s."""

    def on_failure(self, failure: WorldFailure) -> None:
        """Called with the failure that ends the world. In a thread of its own, for at most 1 s, while the report is written."""

    def on_shutdown(self, code: int) -> None:
        """Called in an orderly shutdown before rank 0 releases the other ranks; all will exit with ``code``."""

    def on_exit(self, code: int) -> None:
        """Called once before rank 0 exits, orderly or not, after everything else, in the order in which hooks were added."""


class WorkerHooks(WorkerHook):
    """All hooks of a worker, called as one. Thread-safe.

    Args:
        warn: logs a warning.
    """

    def __init__(self, warn: Callable[[str], object] = lambda _: None) -> None:
        self._warn = warn
        self._hooks: tuple[WorkerHook, ...] = ()
        self._warned: set[tuple[str, str]] = set()
        self._threads: list[threading.Thread] = []
        self._has_exited = False

    def add(self, *hooks: WorkerHook) -> None:
        """Add hooks, which are called after the existing ones."""
        self._hooks += hooks

    def on_phase(self, phase: str) -> None:
        self._call("on_phase", phase)

    def on_progress(self, progress: PhaseProgress) -> None:
        self._call("on_progress", progress)

    def on_hardware_checked(self, figures: dict[str, Any]) -> None:
        self._call("on_hardware_checked", figures)

    def on_staged(self, figures: dict[str, Any]) -> None:
        self._call("on_staged", figures)

    def on_caches(self, figures: dict[str, Any]) -> None:
        self._call("on_caches", figures)

    def on_registered(self, lease: int) -> None:
        self._call("on_registered", lease)

    def on_ready(self) -> None:
        self._call("on_ready")

    def on_requests_in_flight(self, count: int) -> None:
        self._call("on_requests_in_flight", count)

    def on_failure_detected(self) -> None:
        self._start("on_failure_detected")

    def on_failure(self, failure: WorldFailure) -> None:
        self._start("on_failure", failure)

    def on_shutdown(self, code: int) -> None:
        self._call("on_shutdown", code)

    def on_exit(self, code: int) -> None:
        if not self._has_exited:
            self._has_exited = True
            self._call("on_exit", code)

    def wait(self, until: float) -> None:
        """Wait for the threads of `on_failure_detected` and `on_failure`, at most until this moment of the monotonic clock."""
        for thread in tuple(self._threads):
            thread.join(max(0.0, until - time.monotonic()))

    def _start(self, method: str, *arguments: object) -> None:
        for hook in self._hooks:
            if _overrides(hook, method):
                thread = start_thread(partial(self._call_one, hook, method, *arguments))
                if thread is not None:
                    self._threads.append(thread)

    def _call(self, method: str, *arguments: object) -> None:
        for hook in self._hooks:
            self._call_one(hook, method, *arguments)

    def _call_one(self, hook: WorkerHook, method: str, *arguments: object) -> None:
        try:
            methodcaller(method, *arguments)(hook)
        except Exception as error:  # a failing hook must not affect the worker
            failed = type(hook).__name__, method
            if failed not in self._warned:
                self._warned.add(failed)
                self._warn(f"{'.'.join(failed)} failed: {type(error).__name__}: {error}")


def _overrides(hook: WorkerHook, method: str) -> bool:
    return getattr(type(hook), method) is not getattr(WorkerHook, method)
