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
# files that stay in a folder that a deployment has used, and the keys of which each has one
_MARKS, _KEYS = (LOCK, SERVICES_LOCK, DEPLOYMENT, ENDED, EXCLUDED), {"schema", "pid"}
_LOG_NAMES = {"etcd.log", "nats.log", "frontend.log"}
# what a start removes, renames or overwrites: these files, and in these folders those with these endings
_TAKEN_FILES = {SERVICES, STOP, *_MARKS}
_TAKEN_IN = {"logs": (".log",), "ready": ("",), TIMELINES: (".html", ".json"), REPLACE: ("",), SERVICES_LOGS: ()}
_MOST_LISTED = 5


def open_run_dir(path: Path, *, create: bool = False) -> OwnFolder:
    """Open a run folder: it must be this user's alone, and no other user may replace it.

    Args:
        path: the folder.
        create: for a deployment that starts: create it, and the directories before it, where they don't exist.

    Raises:
        AuthorizationError: it is another user's, or this user may not read it.
        UsageError: others can write in it, or replace it; or it is to be used by a deployment that would remove what isn't ours.
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
    """Return what a deployment that starts in a folder would remove, rename or overwrite, if none was ever started there.

    Raises:
        OSError: the folder can't be read.
    """
    names = _visible(folder)
    if any(_is_ours(folder, name) for name in _MARKS) or _has_service_logs(folder):
        return []
    found = [name for name in names if name in _TAKEN_FILES and not _is_empty_lock(folder, name)]
    for name in _TAKEN_IN.keys() & set(names):
        try:
            with folder.subfolder(name) as subfolder:
                found += [f"{name}/{entry}" for entry in _visible(subfolder) if entry.endswith(_TAKEN_IN[name])]
        except NotADirectoryError:
            found.append(name)
    return sorted(found)


def require_usable(folder: OwnFolder) -> None:
    """Raise unless a deployment may use a folder: what it would remove or overwrite there must be ours.

    Raises:
        UsageError: it isn't.
        OSError: it can't be read.
    """
    if names := foreign_names(folder):
        listed = ", ".join(sanitize(name) for name in names[:_MOST_LISTED]) + (" …" if names[_MOST_LISTED:] else "")
        raise UsageError(
            f"the run folder {folder.path} has things that a start would remove or overwrite, and that no deployment has left: {listed}",
            expected="a folder without them, or an earlier deployment's",
            fix="another --run-dir or DYN_MPI_RUN_DIR, or move them away",
        )


def _is_ours(folder: OwnFolder, name: str) -> bool:
    """Return whether a file is there, and is one that this project has written."""
    with contextlib.suppress(OSError, ValueError):
        return bool(_KEYS & (read_object(folder, name) or {}).keys())
    return False


def _has_service_logs(folder: OwnFolder) -> bool:
    """Return whether services have run in a folder: that of their logs is all that they leave."""
    with contextlib.suppress(OSError), folder.subfolder(SERVICES_LOGS) as logs:
        names = _visible(logs)
        return not names or bool(_LOG_NAMES & set(names))
    return False


def _is_empty_lock(folder: OwnFolder, name: str) -> bool:
    """Return whether a file is a lock whose process was killed before it wrote its name."""
    with contextlib.suppress(OSError):
        return name in (LOCK, SERVICES_LOCK) and not folder.read(name)
    return False


def _visible(folder: OwnFolder) -> list[str]:
    """List a folder without what a network file system keeps under a hidden name while it is open."""
    return [name for name in folder.names() if not name.startswith(".")]


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
        return _decoded(folder.read(name))
    except FileNotFoundError:
        return None
    except OSError as error:
        raise ValueError(error.strerror) from None


def _decoded(data: bytes) -> dict[str, Any]:
    try:
        content = json.loads(data)
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
    """Return why the content of ``services.json`` can't be used; empty if it can, doesn't exist, or can't be read at the moment."""
    try:
        variables_in(_decoded(folder.read(SERVICES)))
    except OSError:  # a network file system fails for a moment
        return ""
    except ValueError as error:
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
