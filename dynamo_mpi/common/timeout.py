# SPDX-License-Identifier: Apache-2.0
"""Limits the duration of a call: name resolution has no timeout, and a slow response none as a whole."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable

T = TypeVar("T")


def within(seconds: float, call: Callable[[], T], name: str) -> T:
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
