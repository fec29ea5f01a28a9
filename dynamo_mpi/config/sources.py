# SPDX-License-Identifier: Apache-2.0
"""A worker's command line, environment variables and settings file: each is read once per process, by one order of precedence.

The first rank of each node imports this module before ``MPI_Init``, and needs four of the settings there. The others are resolved from the
same object on rank 0, by `worker.load_settings`.
"""

from __future__ import annotations

from functools import cached_property
from itertools import zip_longest

from dynamo_mpi.common.errors import ConfigFileError, DynamoMpiError
from dynamo_mpi.common.light_typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

MAX_SECONDS = 1e8
WORLD_SECONDS = 600.0
"""Seconds until the preflight result by default: imports from a cold container image on hundreds of nodes take minutes."""
SETTINGS_VARIABLE = "DYN_MPI_SETTINGS"
SETTINGS_FILE = "settings file"
"""The origin of a setting that the file has."""
EARLY = ("heartbeat_timeout", "world_timeout", "failure_dir", "log_dir")
"""The settings that are needed before MPI runs. Flag and variable of each are made of its name."""


class EarlySettings(NamedTuple):
    """Their values, see `worker_options`; a folder that isn't set is empty."""

    heartbeat_timeout: float | None = None
    world_timeout: float = WORLD_SECONDS
    failure_dir: str = ""
    log_dir: str = ""


class WorkerSources:
    """Where a worker's settings come from. A flag takes precedence over a variable, a variable over the settings file.

    Args:
        argv: the command line, without the program.
        environ: environment variables.
    """

    def __init__(self, argv: Sequence[str], environ: Mapping[str, str]) -> None:
        self.argv, self.environ = argv, environ

    @property
    def file_name(self) -> str:
        """The settings file's name; empty if there is none."""
        return _flag(self.argv, "settings") or self.environ.get(SETTINGS_VARIABLE, "")

    @property
    def file(self) -> Mapping[str, Any]:
        """The settings file's values by name; empty if none is named.

        Raises:
            ConfigFileError: the file can't be read.
            UsageError: it isn't a settings file.
        """
        if isinstance(self._file, DynamoMpiError):
            raise self._file
        return self._file

    @cached_property
    def _file(self) -> Mapping[str, Any] | DynamoMpiError:
        path = self.file_name
        if not path:
            return {}
        # imported here, so that a rank without a settings file opens no file for it
        from pathlib import Path

        from dynamo_mpi.common.config_reader import parse_yaml, read_small_text

        try:
            text = read_small_text(Path(path))
            loaded = parse_yaml(text, f"the settings file {path}", "`name: value` lines", may_be_empty=True)
        except OSError as error:
            return ConfigFileError(
                f"the settings file {path} can't be read: {error.strerror}",
                expected="a YAML file that every rank can read",
                fix="check its path and rights",
            )
        except DynamoMpiError as error:
            return error
        return {str(key).replace("-", "_"): value for key, value in loaded.items()}

    @cached_property
    def early_texts(self) -> Mapping[str, tuple[str | None, str]]:
        """Text and origin of each of the `EARLY` settings. Doesn't raise: a settings file that can't be read counts as empty."""
        file = {} if isinstance(self._file, DynamoMpiError) else self._file
        return {
            name: pick(
                name,
                f"--{name.replace('_', '-')}",
                (f"DYN_MPI_{name.upper()}",),
                _flag(self.argv, name.replace("_", "-")),
                self.environ,
                file,
            )
            for name in EARLY
        }

    @cached_property
    def early(self) -> EarlySettings:
        """The `EARLY` settings. Invalid values are ignored here: rank 0 refuses them."""
        texts = {name: text or "" for name, (text, _) in self.early_texts.items()}
        world = _seconds(texts["world_timeout"])
        return EarlySettings(
            _seconds(texts["heartbeat_timeout"]),
            WORLD_SECONDS if world is None else world,
            texts["failure_dir"],
            texts["log_dir"],
        )


def pick(
    name: str,
    flag: str,
    variables: Sequence[str],
    given: str | None,
    environ: Mapping[str, str],
    file: Mapping[str, Any],
) -> tuple[str | None, str]:
    """Return a setting's text, None if it isn't set, and its origin.

    Args:
        name: its name in a settings file.
        flag: its flag, for the origin.
        variables: its variables, in order of precedence.
        given: the flag's value.
        environ: environment variables.
        file: a settings file's values by name.
    """
    if given is not None:
        return given, f"flag {flag}"
    for variable in variables:
        # batch scripts set a variable empty for "not set"
        if environ.get(variable):
            return environ[variable], f"environment {variable}"
    if (value := file.get(name)) is not None:
        if isinstance(value, dict):  # a JSON value of a flag may be written as YAML here
            import json

            return json.dumps(value, default=str), SETTINGS_FILE
        return str(value).lower() if isinstance(value, bool) else str(value), SETTINGS_FILE
    return None, "default"


def to_seconds(text: str) -> float:
    """Parse a number of seconds, at most three years."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= MAX_SECONDS:
        raise ValueError(f"a number of seconds from 0 to {MAX_SECONDS:.0f}")
    return value


def _seconds(text: str) -> float | None:
    try:
        return to_seconds(text)
    except ValueError:
        return None


def _flag(argv: Sequence[str], name: str) -> str | None:
    flag, found = f"--{name}", None
    for word, following in zip_longest(argv, argv[1:], fillvalue=""):
        if word == "--":
            break
        if word == flag:
            found = following
        elif word.startswith(flag + "="):
            found = word.removeprefix(flag + "=")
    return found
