# SPDX-License-Identifier: Apache-2.0
"""Settings of what an operator sees of a worker."""

from __future__ import annotations

from dynamo_mpi.options import Option, to_path, to_seconds

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
)
