# SPDX-License-Identifier: Apache-2.0
"""The options for logs, progress, metrics and health endpoints."""

from __future__ import annotations

from dynamo_mpi.config.options import Option, to_file, to_path, to_runtime_port, to_seconds

MODES = ("auto", "plain", "live", "off")
OBSERVE_OPTIONS: tuple[Option, ...] = (
    Option(
        "log_dir",
        ("--log-dir",),
        ("DYN_MPI_LOG_DIR",),
        None,
        to_path,
        "folder for a file with what each rank says, COMPONENT-rank-N.log: three of 16 MiB at the most",
    ),
    Option(
        "progress",
        ("--progress",),
        ("DYN_MPI_PROGRESS",),
        "auto",
        str,
        "how far the ranks are while it loads: plain lines, or live, a table that stays in its place, where stderr is a terminal; auto is "
        "live where that can be",
        MODES,
        without="off",
    ),
    Option(
        "progress_interval",
        ("--progress-interval",),
        ("DYN_MPI_PROGRESS_INTERVAL",),
        10.0,
        to_seconds,
        "seconds to the first such line of a phase; each following one takes twice as long, up to five minutes",
    ),
    Option(
        "metrics_file",
        ("--metrics-file",),
        ("DYN_MPI_METRICS_FILE",),
        None,
        to_file,
        "keep the world's metrics in this file, NAME.prom, for node_exporter's textfile collector; it stays at the end and tells of it",
    ),
    Option(
        "runtime_system_port",
        ("--runtime-system-port",),
        ("DYN_MPI_RUNTIME_SYSTEM_PORT",),
        None,
        to_runtime_port,
        "where DYN_SYSTEM_PORT is set: port of the Dynamo runtime beside it on rank 0's node, from which frontends fetch the model's "
        "tokenizer; any free one by default",
    ),
    Option(
        "timeline",
        ("--timeline",),
        ("DYN_MPI_TIMELINE",),
        None,
        to_file,
        "write a picture of the start, every rank's phases, as a page (HTML) here and as a trace for Perfetto beside it (.trace.json), "
        "once it is ready and again at its end",
    ),
)
