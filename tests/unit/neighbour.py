# SPDX-License-Identifier: Apache-2.0
"""Another user on the same machine, as a child of a test that runs as root."""

from __future__ import annotations

import contextlib
import os
import signal
import traceback
from collections.abc import Callable, Iterator
from types import FrameType

import pytest

NOBODY = 65534
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")


def become_neighbour() -> None:
    """Become another user, in a child process."""
    os.setgroups([])
    os.setgid(NOBODY)
    os.setuid(NOBODY)
    os.umask(0)


def as_neighbour(act: Callable[[], object]) -> None:
    """Do something as another user."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            become_neighbour()
            act()
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    assert os.waitpid(child, 0)[1] == 0, "the neighbour could not do it"


@contextlib.contextmanager
def within(seconds: float) -> Iterator[None]:
    """Fail if the block takes longer."""

    def late(number: int, frame: FrameType | None) -> None:
        pytest.fail(f"it was held for {seconds:g} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
