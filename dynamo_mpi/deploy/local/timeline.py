# SPDX-License-Identifier: Apache-2.0
"""The timeline of the stack's start: the services, and every rank of the workers."""

from __future__ import annotations

import contextlib
import os
from typing import TYPE_CHECKING

from dynamo_mpi.common.errors import DynamoMpiError, UsageError
from dynamo_mpi.common.phases import RankTimings, Span
from dynamo_mpi.telemetry.startup_trace import ENDED, StartupTrace, printable, read_traces
from dynamo_mpi.telemetry.trace_writer import write_timeline

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

_SERVICES = ("etcd", "nats", "frontend")


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
    host = printable(os.uname().nodename.partition(".")[0])
    services = tuple(
        RankTimings(at, host, began, (Span(name, 0.0, None, seconds[name]),))
        for at, name in enumerate(name for name in _SERVICES if name in seconds)
    )
    starts = [StartupTrace("services", "launch", "", "", "", ENDED, written, None, services)] if services else []
    for page in pages:
        with contextlib.suppress(DynamoMpiError):
            starts += read_traces(page)
    if not starts:
        return
    try:
        write_timeline(path, starts)
    except OSError as error:
        raise UsageError(
            f"the timeline {path} can't be written: {error.strerror}", fix="check its folder and rights"
        ) from None
