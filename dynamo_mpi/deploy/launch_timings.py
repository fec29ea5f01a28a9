# SPDX-License-Identifier: Apache-2.0
"""The durations of the launcher's own steps before its workers, in a file beside the workers' timelines."""

from __future__ import annotations

import contextlib
import json
import os
import time
from typing import TYPE_CHECKING

from dynamo_mpi.common.phases import RankTimings, Span
from dynamo_mpi.telemetry.startup_trace import ENDED, FAILED, StartupTrace, encode_traces, printable, write_atomically

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


class Milestones:
    """Measures steps, and writes the file after each.

    Args:
        path: the file; an error in writing it is ignored.
        name: the launcher's name.
    """

    def __init__(self, path: Path, name: str) -> None:
        self._path, self._name, self._began = path, name, time.time()
        self._spans: list[Span] = []

    @contextlib.contextmanager
    def step(self, name: str) -> Iterator[None]:
        """Measure the block."""
        began = time.time()
        outcome = FAILED
        try:
            yield
            outcome = ENDED
        finally:
            now = time.time()
            self._spans.append(Span(name, began - self._began, None, now - began))
            with contextlib.suppress(OSError):
                write_atomically(self._path, json.dumps(encode_traces([self._start(outcome, now)])) + "\n")

    def _start(self, outcome: str, now: float) -> StartupTrace:
        host = printable(os.uname().nodename.partition(".")[0])
        rank = RankTimings(0, host, self._began, tuple(self._spans))
        return StartupTrace(printable(self._name), "launch", "", "", "", outcome, now, None, (rank,))
