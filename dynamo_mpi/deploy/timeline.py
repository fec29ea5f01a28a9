# SPDX-License-Identifier: Apache-2.0
"""The timelines of a start apart from the workers' own: the launcher's steps, and the stack of ``dynamo-mpi local``."""

from __future__ import annotations

import contextlib
import json
import os
import time
from dataclasses import replace
from typing import TYPE_CHECKING

from dynamo_mpi.common.errors import DynamoMpiError, UsageError
from dynamo_mpi.common.folder_walk import fix_for
from dynamo_mpi.common.own_files import make_folder, open_own, remove_own, write_own
from dynamo_mpi.common.phases import RankTimings, Span
from dynamo_mpi.telemetry.startup_trace import (
    ENDED,
    FAILED,
    READY,
    FailureMark,
    StartupTrace,
    encode_traces,
    printable,
    read_traces,
)
from dynamo_mpi.telemetry.trace_writer import perfetto_path, write_timeline

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path

    from dynamo_mpi.deploy.blame import Blame


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
            self.add(name, began, outcome)

    def add(self, name: str, began: float, outcome: str = ENDED) -> None:
        """Add a step that has just ended.

        Args:
            name: its name.
            began: when it began, in seconds since 1970.
            outcome: how the launcher is doing.
        """
        now = time.time()
        self._spans.append(Span(name, began - self._began, None, now - began))
        with contextlib.suppress(OSError):
            write_own(self._path, f"{json.dumps(encode_traces([self._start(outcome, now)]))}\n".encode())

    def _start(self, outcome: str, now: float) -> StartupTrace:
        host = printable(os.uname().nodename.partition(".")[0])
        rank = RankTimings(0, host, self._began, tuple(self._spans))
        return StartupTrace(printable(self._name), "launch", "", "", "", outcome, now, None, (rank,))


def keep_failed_start(page: Path, kept: Path, found: Blame | None) -> None:
    """Keep the timeline of a start that failed, before the worker's next start replaces it. Does not raise.

    Args:
        page: the start's page; a rank 0 that was killed could not write the failure into it.
        kept: the page to write.
        found: the first cause; None if it ended on request.
    """
    with contextlib.suppress(DynamoMpiError, OSError):
        starts = [_with_failure(start, found) for start in read_traces(page)]
        write_timeline(kept, starts)


def _with_failure(start: StartupTrace, found: Blame | None) -> StartupTrace:
    if found is None or start.outcome != READY:
        return start
    rank = found.rank if found.rank >= 0 else None
    host, phase, error = (printable(text) for text in (found.host, found.phase, found.error or "no error text"))
    mark = FailureMark(rank, host, phase, error, found.code, reported=False)
    return replace(start, outcome=FAILED, failure=mark, written=time.time())


_SERVICES = ("etcd", "nats", "frontend")


def write_services(path: Path, began: float, seconds: Mapping[str, float]) -> None:
    """Write the start of a stack's services where `dynamo-mpi timeline` finds it in a run folder. An error in writing it is ignored.

    Args:
        path: the file.
        began: when the stack started, in seconds since 1970.
        seconds: by part, seconds from the start until it answered.
    """
    with contextlib.suppress(OSError):
        write_own(path, f"{json.dumps(encode_traces(_service_starts(began, time.time(), seconds)))}\n".encode())


def _service_starts(began: float, written: float, seconds: Mapping[str, float]) -> list[StartupTrace]:
    host = printable(os.uname().nodename.partition(".")[0])
    services = tuple(
        RankTimings(at, host, began, (Span(name, 0.0, None, seconds[name]),))
        for at, name in enumerate(name for name in _SERVICES if name in seconds)
    )
    return [StartupTrace("services", "launch", "", "", "", ENDED, written, None, services)] if services else []


def draw_stack(path: Path, pages: Sequence[Path], began: float, written: float, seconds: Mapping[str, float]) -> None:
    """Write one timeline of all parts.

    Args:
        path: the page; the trace is written beside it.
        pages: the workers' timelines; missing ones are left out.
        began: when the stack started, in seconds since 1970.
        written: the current time.
        seconds: by part, seconds from the start until it answered.

    Raises:
        UsageError: it can't be written.
    """
    starts = _service_starts(began, written, seconds)
    for page in pages:
        with contextlib.suppress(DynamoMpiError):
            starts += read_traces(page)
    if starts:
        with _refusing(path):
            write_timeline(path, starts)


def require_writable(path: Path) -> None:
    """Check that a timeline can be written, before the start that it is of; one of an earlier start stays as it is.

    Raises:
        UsageError: it can't.
    """
    with _refusing(path):
        make_folder(path.parent)
        for file in (path, perfetto_path(path)):
            with contextlib.suppress(FileNotFoundError):
                os.close(open_own(file, os.O_WRONLY))
        # both are written under such a name, and renamed
        partial = perfetto_path(path).with_name(f".{perfetto_path(path).name}.{os.urandom(8).hex()}")
        os.close(open_own(partial, os.O_WRONLY | os.O_CREAT))
        remove_own(partial)


@contextlib.contextmanager
def _refusing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UsageError(
            f"the timeline {path} can't be written: {error.strerror}",
            expected="a file that this user can write",
            fix=fix_for(error, "check its folder and rights"),
        ) from None
