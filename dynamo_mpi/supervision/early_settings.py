# SPDX-License-Identifier: Apache-2.0
"""What a node agent goes by before the verdict: the few of a worker's settings that count before rank 0 has read them. Pure."""

from __future__ import annotations

from itertools import zip_longest
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

WORLD_SECONDS = 600.0
"""How long the ranks may take to the verdict by default: a cold container image on hundreds of nodes takes minutes to import from."""


class Limits(NamedTuple):
    """What the node agent goes by.

    Args:
        heartbeat_timeout: see `Meeting`.
        world_seconds: until the verdict.
        failure_dir: see `Meeting`.
        log_dir: see `Meeting`.
    """

    heartbeat_timeout: float | None = None
    world_seconds: float = WORLD_SECONDS
    failure_dir: str = ""
    log_dir: str = ""

    @classmethod
    def of(cls, argv: Sequence[str], environ: Mapping[str, str]) -> Limits:
        """Read them from a worker's flags and variables. What can't be read is for rank 0's settings to refuse."""
        heartbeat = _seconds(_early(argv, environ, "--heartbeat-timeout", "DYN_MPI_HEARTBEAT_TIMEOUT"))
        world = _seconds(_early(argv, environ, "--world-timeout", "DYN_MPI_WORLD_TIMEOUT"))
        folder = _early(argv, environ, "--failure-dir", "DYN_MPI_FAILURE_DIR")
        logs = _early(argv, environ, "--log-dir", "DYN_MPI_LOG_DIR")
        return cls(heartbeat, WORLD_SECONDS if world is None else world, folder, logs)


def _early(argv: Sequence[str], environ: Mapping[str, str], flag: str, variable: str) -> str:
    found = environ.get(variable, "")
    for word, following in zip_longest(argv, argv[1:], fillvalue=""):
        if word == flag:
            found = following
        elif word.startswith(flag + "="):
            found = word.removeprefix(flag + "=")
    return found


def _seconds(text: str) -> float | None:
    try:
        seconds = float(text)
    except ValueError:
        return None
    return seconds if seconds >= 0 else None
