# SPDX-License-Identifier: Apache-2.0
"""Runs work in threads that must neither delay nor fail their caller."""

from __future__ import annotations

import contextlib
import threading
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable


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
