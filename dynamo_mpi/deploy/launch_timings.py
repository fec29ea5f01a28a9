# SPDX-License-Identifier: Apache-2.0
"""How long the launcher's own steps took, before its workers: kept beside the workers' timelines."""

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
    """Takes the time of steps, and writes it down after each.

    Args:
        path: where; that it can't be written is no reason for anything.
        name: of whoever launches.
    """

    def __init__(self, path: Path, name: str) -> None:
        self._path, self._name, self._began = path, name, time.time()
        self._spans: list[Span] = []

    @contextlib.contextmanager
    def step(self, name: str) -> Iterator[None]:
        """Take the time of the block."""
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
