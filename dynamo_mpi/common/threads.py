# SPDX-License-Identifier: Apache-2.0
"""Runs work in threads that must neither delay nor fail their caller."""

from __future__ import annotations

import contextlib
import threading
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable


def start_thread(act: Callable[[], object], name: str | None = None) -> threading.Thread | None:
    """Call ``act`` in a daemon thread, suppressing what it raises; return the thread, or None where this user may have no more threads."""
    thread = threading.Thread(target=run_suppressed, args=(act,), name=name, daemon=True)
    try:
        thread.start()
    except RuntimeError:
        return None
    return thread


def run_suppressed(act: Callable[[], object]) -> None:
    """Call ``act``, suppressing what it raises: it belongs to an end that must come."""
    with contextlib.suppress(Exception):
        act()
