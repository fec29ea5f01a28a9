# SPDX-License-Identifier: Apache-2.0
"""Opens a run folder, reads and writes its files; `deploy.run_dir` has what the processes that hold one do."""

from __future__ import annotations

import contextlib
import json
import os
from typing import TYPE_CHECKING, Any, NamedTuple

from dynamo_mpi.common.credentials import variables_in
from dynamo_mpi.common.display import sanitize
from dynamo_mpi.common.errors import AuthorizationError, DynamoMpiError, UsageError
from dynamo_mpi.common.folder_walk import ForeignFileError, UnsafeFileError
from dynamo_mpi.common.own_files import OwnFolder
from dynamo_mpi.deploy.step_commands import SERVICES

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

DEPLOYMENT, ENDED, LOCK, STOP, REPLACE = "deployment.json", "ended.json", "lock", "stop", "replace"
EXCLUDED = "excluded.json"
SERVICES_LOCK, SERVICES_LOGS = "services.lock", "services"
TIMELINES = "timeline"
"""The subfolder for timelines of the start."""
# files that stay in a folder that a deployment has used
_MARKS = (LOCK, SERVICES_LOCK, DEPLOYMENT, ENDED, EXCLUDED)
_MOST_LISTED = 5


def open_run_dir(path: Path, *, create: bool = False) -> OwnFolder:
    """Open a run folder: it must be this user's alone, and no other user may replace it.

    Args:
        path: the folder.
        create: for a deployment that starts: create it, and the directories before it, where they don't exist.

    Raises:
        AuthorizationError: it is another user's, or this user may not read it.
        UsageError: others can write in it, or replace it; or it is to be used by a deployment, and has other things in it.
        OSError: it doesn't exist, or can't be opened.
    """
    try:
        folder = OwnFolder(path, guarded=True, create=create)
    except PermissionError as error:
        raise _refusal(path, error) from None
    if create:
        with contextlib.ExitStack() as stack:
            stack.callback(folder.close)
            require_usable(folder)
            stack.pop_all()
    return folder


def check_run_dir(path: Path) -> None:
    """Raise what a deployment that starts in a folder would raise, as far as that is known without creating it.

    Raises:
        AuthorizationError, UsageError: as for `open_run_dir`; or it can't be created or used.
    """
    try:
        with open_run_dir(path) as folder:
            require_usable(folder)
    except FileNotFoundError:
        # further up, it may be a file system of the cluster, which isn't here
        if path.parent.is_dir() and not os.access(path.parent, os.W_OK | os.X_OK):
            raise unusable(path, f"{path.parent} isn't writable") from None
    except OSError as error:
        raise unusable(path, error.strerror) from None


def unusable(path: Path, problem: str | None) -> UsageError:
    """Return the error for a run folder that can't be created or used."""
    return UsageError(
        f"the run folder {path} can't be used: {problem}",
        expected="a folder that all nodes see and that this user can make and write",
        fix="--run-dir FOLDER, or DYN_MPI_RUN_DIR",
    )


def foreign_names(folder: OwnFolder) -> list[str]:
    """Return the names of the things in a folder in which no deployment was ever started; a deployment could remove or overwrite them.

    Raises:
        OSError: the folder can't be read.
    """
    # a network file system keeps files that are still open under a hidden name
    names = [name for name in folder.names() if not name.startswith(".")]
    # these are all that a services process, or one that was killed at once, leaves
    is_usable = set(names) <= {LOCK, SERVICES_LOCK, SERVICES_LOGS} or any(_is_ours(folder, name) for name in _MARKS)
    return [] if is_usable else names


def require_usable(folder: OwnFolder) -> None:
    """Raise unless a deployment may use a folder: an empty one, or one in which one was started before.

    Raises:
        UsageError: it has other things in it.
        OSError: it can't be read.
    """
    if names := foreign_names(folder):
        listed = ", ".join(sanitize(name) for name in names[:_MOST_LISTED]) + (" …" if names[_MOST_LISTED:] else "")
        raise UsageError(
            f"the run folder {folder.path} has things that no deployment has left there: {listed}",
            expected="a folder that doesn't exist yet, is empty, or is an earlier deployment's",
            fix="another --run-dir, or DYN_MPI_RUN_DIR",
        )


def _is_ours(folder: OwnFolder, name: str) -> bool:
    """Return whether a file is there, and is one that this project has written: all have a JSON object."""
    with contextlib.suppress(ValueError):
        return read_object(folder, name) is not None
    return False


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


def services_problem(folder: OwnFolder) -> str:
    """Return why ``services.json`` can't be used; empty if it can, or doesn't exist."""
    try:
        content = read_object(folder, SERVICES)
        if content is not None:
            variables_in(content)
    except (OSError, ValueError) as error:
        return str(error)
    return ""


def read_services(folder: OwnFolder) -> ServiceAccess | None:
    """Read ``services.json``; None if it doesn't exist yet, or makes no sense."""
    try:
        content = read_object(folder, SERVICES) or {}
        environment = variables_in(content)
    except (OSError, ValueError):
        return None
    return ServiceAccess(str(content.get("url") or ""), str(content.get("host") or ""), environment)
