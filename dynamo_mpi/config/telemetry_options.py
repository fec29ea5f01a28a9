# SPDX-License-Identifier: Apache-2.0
"""The options for logs, progress, metrics and health endpoints."""

from __future__ import annotations

from dynamo_mpi.config.options import Option, to_file, to_path, to_runtime_port
from dynamo_mpi.config.sources import to_seconds

MODES = ("auto", "plain", "live", "off")
OBSERVE_OPTIONS: tuple[Option, ...] = (
    Option(
        "log_dir",
        ("--log-dir",),
        ("DYN_MPI_LOG_DIR",),
        None,
        to_path,
        "folder for each rank's log file, COMPONENT-rank-N.log; at most three files of 16 MiB per rank",
    ),
    Option(
        "progress",
        ("--progress",),
        ("DYN_MPI_PROGRESS",),
        "auto",
        str,
        "the ranks' progress during load: plain for lines, live for a table that is updated in place, if stderr is a terminal; auto is "
        "live if possible",
        MODES,
        without="off",
    ),
    Option(
        "progress_interval",
        ("--progress-interval",),
        ("DYN_MPI_PROGRESS_INTERVAL",),
        10.0,
        to_seconds,
        "seconds until the first progress line of a phase; each further interval is twice as long, up to five minutes",
    ),
    Option(
        "metrics_file",
        ("--metrics-file",),
        ("DYN_MPI_METRICS_FILE",),
        None,
        to_file,
        "file for the worker's metrics, NAME.prom, for node_exporter's textfile collector; it stays after the end and contains its result",
    ),
    Option(
        "runtime_system_port",
        ("--runtime-system-port",),
        ("DYN_MPI_RUNTIME_SYSTEM_PORT",),
        None,
        to_runtime_port,
        "if DYN_SYSTEM_PORT is set: the Dynamo runtime's port on rank 0's node, from which frontends fetch the model's tokenizer; by "
        "default any free port",
    ),
    Option(
        "timeline",
        ("--timeline",),
        ("DYN_MPI_TIMELINE",),
        None,
        to_file,
        "write a timeline of every rank's phases as an HTML page here and as a Perfetto trace beside it (.trace.json), when the worker is "
        "ready and again at its end",
    ),
)
