# SPDX-License-Identifier: Apache-2.0
"""The settings that a node agent needs before rank 0 has read all settings in preflight.

A flag takes precedence over a variable, a variable over the settings file, as in `settings.load_settings`; a test compares the two.
"""

from __future__ import annotations

from functools import partial
from itertools import zip_longest
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

WORLD_SECONDS = 600.0
"""Seconds until the preflight result by default: imports from a cold container image on hundreds of nodes take minutes."""


class Limits(NamedTuple):
    """The node agent's settings.

    Args:
        heartbeat_timeout: see `Rendezvous`.
        world_seconds: seconds until the preflight result.
        failure_dir: see `Rendezvous`.
        log_dir: see `Rendezvous`.
    """

    heartbeat_timeout: float | None = None
    world_seconds: float = WORLD_SECONDS
    failure_dir: str = ""
    log_dir: str = ""

    @classmethod
    def of(cls, argv: Sequence[str], environ: Mapping[str, str]) -> Limits:
        """Read them from a worker's flags, variables and settings file. Invalid values are ignored; rank 0's settings refuse them."""
        find = partial(_find, argv, environ, _settings_file(argv, environ))
        world = _seconds(find("world-timeout"))
        return cls(
            _seconds(find("heartbeat-timeout")),
            WORLD_SECONDS if world is None else world,
            find("failure-dir"),
            find("log-dir"),
        )


def _find(argv: Sequence[str], environ: Mapping[str, str], file: Mapping[str, str], name: str) -> str:
    name_in_variables = f"DYN_MPI_{name.upper().replace('-', '_')}"
    return _flag(argv, name) or environ.get(name_in_variables, "") or file.get(name.replace("-", "_"), "")


def _flag(argv: Sequence[str], name: str) -> str:
    flag, found = f"--{name}", ""
    for word, following in zip_longest(argv, argv[1:], fillvalue=""):
        if word == flag:
            found = following
        elif word.startswith(flag + "="):
            found = word.removeprefix(flag + "=")
    return found


def _settings_file(argv: Sequence[str], environ: Mapping[str, str]) -> dict[str, str]:
    path = _flag(argv, "settings") or environ.get("DYN_MPI_SETTINGS", "")
    if not path:
        return {}
    # imported here, so that a rank without a settings file opens no file for it
    from pathlib import Path

    from dynamo_mpi.common.config_reader import parse_yaml
    from dynamo_mpi.common.errors import DynamoMpiError
    from dynamo_mpi.common.files import read_small_text

    try:
        loaded = parse_yaml(read_small_text(Path(path)), path, "", may_be_empty=True)
    except (OSError, DynamoMpiError):
        return {}
    return {str(key).replace("-", "_"): "" if value is None else str(value) for key, value in loaded.items()}


def _seconds(text: str) -> float | None:
    try:
        seconds = float(text)
    except ValueError:
        return None
    return seconds if seconds >= 0 else None
