# SPDX-License-Identifier: Apache-2.0
"""Bounds waiting: calls with a time limit, threads that neither delay nor fail their caller, and reminders at growing intervals."""

from __future__ import annotations

import contextlib
import threading
import time

from dynamo_mpi.common.light_typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

T = TypeVar("T")


def call_with_timeout(seconds: float, call: Callable[[], T], name: str) -> T:
    """Return the result of ``call``, or raise its exception.

    Args:
        seconds: the time limit. A call that takes longer continues in a daemon thread.
        call: the function.
        name: the thread's name.

    Raises:
        TimeoutError: the call takes longer.
    """
    results: list[T] = []
    errors: list[Exception] = []

    def run() -> None:
        try:
            results.append(call())
        except Exception as error:  # raised again below
            errors.append(error)

    thread = threading.Thread(target=run, name=name, daemon=True)
    thread.start()
    thread.join(seconds)
    if errors:
        raise errors[0]
    if not results:
        raise TimeoutError
    return results[0]


def poll_until(end: float, seconds: float, late: Callable[[], Exception]) -> Iterator[None]:
    """Yield at once, then every few seconds: for a caller that looks each time, and leaves the loop when it has found what it waits for.

    Args:
        end: the time limit, by `time.monotonic`.
        seconds: the pauses.
        late: makes the exception that is raised after the time limit.
    """
    while True:
        yield
        if (left := end - time.monotonic()) <= 0:
            raise late()
        time.sleep(min(seconds, left))


def start_thread(act: Callable[[], object], name: str | None = None) -> threading.Thread | None:
    """Call ``act`` in a daemon thread and suppress its exceptions; return the thread, or None if the thread limit is reached."""
    thread = threading.Thread(target=run_suppressed, args=(act,), name=name, daemon=True)
    try:
        thread.start()
    except RuntimeError:
        return None
    return thread


def run_suppressed(act: Callable[[], object]) -> None:
    """Call ``act`` and suppress its exceptions, for a shutdown that must continue."""
    with contextlib.suppress(Exception):
        act()


@contextlib.contextmanager
def call_if_late(seconds: float, late: Callable[[], object]) -> Iterator[None]:
    """Call ``late`` from a thread if the body takes longer than ``seconds``."""
    timer = threading.Timer(seconds, late)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


class ReminderSchedule:
    """The reminders of one wait, which begins when this object is created.

    Args:
        first_seconds: seconds until the first reminder; each further interval is twice as long.
        longest_seconds: the longest interval between two reminders.
    """

    def __init__(self, first_seconds: float, longest_seconds: float) -> None:
        self._began = time.monotonic()
        self._period, self._longest = first_seconds, longest_seconds
        self._next = self._began + first_seconds

    def due(self) -> float:
        """Return the seconds since the start if a reminder is due, otherwise 0."""
        now = time.monotonic()
        if now < self._next:
            return 0.0
        self._period = min(2 * self._period, self._longest)
        self._next = now + self._period
        return now - self._began
