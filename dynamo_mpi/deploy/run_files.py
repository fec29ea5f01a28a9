# SPDX-License-Identifier: Apache-2.0
"""Opens a run folder, reads and writes its files; `deploy.run_dir` has what the processes that hold one do."""

from __future__ import annotations

import contextlib
import json
import os
from typing import TYPE_CHECKING, Any, NamedTuple

from dynamo_mpi.common.credentials import variables_in
from dynamo_mpi.common.errors import AuthorizationError, DynamoMpiError, UsageError
from dynamo_mpi.common.folder_walk import ForeignFileError, UnsafeFileError
from dynamo_mpi.common.own_files import OwnFolder
from dynamo_mpi.deploy.step_commands import SERVICES

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

DEPLOYMENT, ENDED, LOCK, STOP, REPLACE = "deployment.json", "ended.json", "lock", "stop", "replace"
SERVICES_LOCK, SERVICES_LOGS = "services.lock", "services"
TIMELINES = "timeline"
"""The subfolder for timelines of the start."""


def open_run_dir(path: Path, *, create: bool = False) -> OwnFolder:
    """Open a run folder: it must be this user's alone, and no other user may replace it.

    Args:
        path: the folder.
        create: create it, and the directories before it, where they don't exist.

    Raises:
        AuthorizationError: it is another user's, or this user may not read it.
        UsageError: others can write in it, or replace it.
        OSError: it doesn't exist, or can't be opened.
    """
    try:
        return OwnFolder(path, guarded=True, create=create)
    except PermissionError as error:
        raise _refusal(path, error) from None


def is_run_dir(folder: OwnFolder) -> bool:
    """Return whether a deployment, or its services, has ever been started in a folder, or was refused there.

    Raises:
        OSError: the folder can't be read.
    """
    names = set(folder.names())
    if names & {LOCK, SERVICES_LOCK, DEPLOYMENT, ENDED, SERVICES}:
        return True
    with contextlib.suppress(OSError), folder.subfolder(SERVICES_LOGS):  # /etc/services is a file
        return SERVICES_LOGS in names
    return False


def _refusal(path: Path, error: PermissionError) -> DynamoMpiError:
    if not isinstance(error, UnsafeFileError):
        return AuthorizationError(
            f"the run folder {path} can't be read: {error.strerror}",
            expected="a run folder of this user's",
            fix="ask the user who launched it",
        )
    found = str(error.strerror)
    if isinstance(error, ForeignFileError):
        needed = f"a run folder of user {os.geteuid()}: it holds credentials"
        return AuthorizationError(found, expected=needed, fix="ask the user who launched it, or take another --run-dir")
    return UsageError(
        found,
        expected="a run folder, with credentials, that no other user can write or replace",
        fix=error.fix or "another --run-dir",
    )


def read_object(folder: OwnFolder, name: str) -> dict[str, Any] | None:
    """Return the content of one of a run folder's JSON files; None if it doesn't exist.

    Raises:
        ValueError: it is no JSON object, or can't be read; the text says why.
    """
    # list the folder first: a network file system caches for some time that a file didn't exist
    if name not in folder.names():
        return None
    try:
        content = json.loads(folder.read(name))
    except FileNotFoundError:
        return None
    except OSError as error:
        raise ValueError(error.strerror) from None
    except (ValueError, RecursionError):
        raise ValueError("no JSON") from None
    if not isinstance(content, dict):
        raise ValueError("no JSON object")
    return content


def write_object(folder: OwnFolder, name: str, content: Mapping[str, Any]) -> None:
    """Write JSON that only its owner can read, atomically.

    Raises:
        OSError: it can't be written.
    """
    folder.write(name, f"{json.dumps(content, indent=2)}\n".encode(), sync=True)


class ServiceAccess(NamedTuple):
    """What ``services.json`` says.

    Args:
        url: the frontend's; empty if there is none.
        host: where the services run.
        environment: the variables for their clients, see `variables_in`: the file can't set a rank's PATH.
    """

    url: str
    host: str
    environment: dict[str, str]


def read_services(folder: OwnFolder) -> ServiceAccess | None:
    """Read ``services.json``; None if it doesn't exist yet, or makes no sense."""
    try:
        content = read_object(folder, SERVICES) or {}
        environment = variables_in(content)
    except (OSError, ValueError):
        return None
    return ServiceAccess(str(content.get("url") or ""), str(content.get("host") or ""), environment)
