# SPDX-License-Identifier: Apache-2.0
"""A job's folder on a file system that others use too: it holds credentials, so it has to be its user's alone."""

from __future__ import annotations

import os
import shlex
from typing import TYPE_CHECKING

from dynamo_mpi.errors import UsageError

if TYPE_CHECKING:
    from pathlib import Path

_WRITABLE_BY_OTHERS = 0o022


def require_own(folder: Path) -> None:
    """Refuse a folder that is somebody else's, or that others can write in.

    Raises:
        UsageError: it is such a folder.
        OSError: it can't be looked at.
    """
    status = folder.stat()
    if status.st_uid != os.geteuid():
        raise UsageError(
            f"the job's folder {folder} belongs to user {status.st_uid}",
            needed=f"a folder of user {os.geteuid()}: it holds the job's credentials",
            fix="another --run-dir",
        )
    if status.st_mode & _WRITABLE_BY_OTHERS:
        raise UsageError(
            f"others can write in the job's folder {folder} (mode {status.st_mode & 0o7777:04o})",
            needed="a folder that only you can write: it holds the job's credentials",
            fix=shlex.join(["chmod", "700", str(folder)]),
        )
