# SPDX-License-Identifier: Apache-2.0
"""The stack's start as a picture: the services, and every rank of the workers."""

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
    """Write one picture of all parts.

    Args:
        path: where; the trace stands beside it.
        pages: what the workers have drawn; those that came to nothing are left out.
        began: when the stack began, in seconds since 1970.
        written: now.
        seconds: from there to when each part answered.

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
