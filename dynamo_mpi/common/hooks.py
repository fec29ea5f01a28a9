# SPDX-License-Identifier: Apache-2.0
"""The hook interface of rank 0's lifecycle (worker record, metrics, health, timeline ...); each hook is a module of its own.

To add one: subclass `WorkerHook`, override the methods that it needs, and add it where rank 0 builds the others (`worker_hooks`).
"""

from __future__ import annotations

import threading
import time
from functools import partial
from operator import methodcaller
from typing import TYPE_CHECKING, Any, NamedTuple

from dynamo_mpi.common.threads import start_thread

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from dynamo_mpi.common.failure import Failure
    from dynamo_mpi.common.phases import PhaseProgress


class WorldFailure(NamedTuple):
    """What a world ends of.

    Args:
        failures: the first cause, then what followed from it.
        host: where the first cause happened.
        report: the text that people read.
    """

    failures: Sequence[Failure]
    host: str
    report: str

    @property
    def first(self) -> Failure:
        """The first cause."""
        return self.failures[0]


class WorkerHook:
    """One concern's view of a worker. Every method does nothing by default.

    Unless a method says otherwise it is called in the thread in which the thing happens, and must be quick. What it raises is said once, as a
    warning, and changes nothing else.
    """

    def on_phase(self, phase: str) -> None:
        """A phase begins. May be called in a signal's handler."""

    def on_progress(self, progress: PhaseProgress) -> None:
        """How far the ranks are in a phase that takes long: every two seconds, in a thread of the progress reporter."""

    def on_hardware_checked(self, figures: dict[str, Any]) -> None:
        """The hardware checks have passed; ``figures`` as the worker's record holds them."""

    def on_registered(self, lease: int) -> None:
        """Dynamo's runtime has registered the worker under this lease, whose id is the instance's too."""

    def on_ready(self) -> None:
        """The worker answers requests: a real completion has passed through all ranks."""

    def on_requests_in_flight(self, count: int) -> None:
        """The number of requests in flight has changed."""

    def on_failure_detected(self) -> None:
        """A failure is known, its cause not yet. In a thread of its own, which gets a second."""

    def on_failure(self, failure: WorldFailure) -> None:
        """The world ends of this. In a thread of its own, which gets a second; the report is written meanwhile."""

    def on_shutdown(self, code: int) -> None:
        """An orderly end: rank 0 is about to release the other ranks, and all will exit with ``code``."""

    def on_exit(self, code: int) -> None:
        """The end, in order or not; called once, after everything else, in the order in which hooks were added."""


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
        """Add hooks, to be called after those that are there."""
        self._hooks += hooks

    def on_phase(self, phase: str) -> None:
        self._call("on_phase", phase)

    def on_progress(self, progress: PhaseProgress) -> None:
        self._call("on_progress", progress)

    def on_hardware_checked(self, figures: dict[str, Any]) -> None:
        self._call("on_hardware_checked", figures)

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
        while self._threads:
            self._threads.pop().join(max(0.0, until - time.monotonic()))

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
        except Exception as error:  # of any kind: the worker goes on, or ends, without it
            failed = type(hook).__name__, method
            if failed not in self._warned:
                self._warned.add(failed)
                self._warn(f"{'.'.join(failed)} failed: {type(error).__name__}: {error}")


def _overrides(hook: WorkerHook, method: str) -> bool:
    return getattr(type(hook), method) is not getattr(WorkerHook, method)
