# SPDX-License-Identifier: Apache-2.0
"""Finds and opens the run folder that a verb is for."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import TYPE_CHECKING

from dynamo_mpi.common.display import sanitize
from dynamo_mpi.common.errors import AuthorizationError, DynamoMpiError, UsageError
from dynamo_mpi.common.own_files import OwnFolder
from dynamo_mpi.deploy.run_files import DEPLOYMENT, is_run_dir, open_run_dir

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping


class NoRunDirError(UsageError):
    """There is no such run folder (yet): nothing of this name, or a folder in which no deployment has ever been started.

    The right answer of every verb that takes one: a wrong name must not look like a deployment that has ended.
    """

    def __init__(self, run_dir: Path | None) -> None:
        is_folder = run_dir is not None and run_dir.is_dir()
        super().__init__(
            f"{run_dir} is no run folder: no deployment was ever started in it"
            if is_folder
            else f"there is no folder {run_dir}",
            expected="the run folder of a deployment",
            fix="--run-dir DIR of one, or start it",
        )


def select_run_dirs(has: Callable[[OwnFolder], bool]) -> list[Path]:
    """Return the current folder's run folders of this user for which ``has`` is true; others' aren't looked into.

    Raises:
        UsageError: one of them is refused, see `open_run_dir`.
    """
    found = []
    for name in sorted(os.listdir()):
        if name.startswith("dynamo_mpi-"):
            try:
                with open_run_dir(Path(name)) as folder:
                    if has(folder):
                        found.append(Path(name))
            except UsageError:
                # others may have written in it, so this only selects the refusal to report
                with contextlib.suppress(OSError), OwnFolder(".") as here, here.subfolder(name) as folder:
                    if has(folder):
                        raise
            except (OSError, DynamoMpiError):  # somebody else's, or no folder
                continue
    return found


def find_run_dir(environ: Mapping[str, str]) -> Path | None:
    """Return the folder that `launch` uses in this job, or else the only one in the current folder in which a deployment runs.

    Raises:
        UsageError: there are several, or the one is refused.
    """
    if job := environ.get("SLURM_JOB_ID"):
        return Path(f"dynamo_mpi-{job}")
    found = select_run_dirs(lambda folder: DEPLOYMENT in folder.names())
    if len(found) > 1:
        raise UsageError(
            f"{len(found)} deployments run in folders of {Path.cwd()}: {', '.join(sanitize(path.name) for path in found)}",
            expected="one of them",
            fix="--run-dir DIR",
        )
    return found[0] if found else None


def choose_run_dir(named: Path | None, environ: Mapping[str, str], expected: str, fix: str) -> Path:
    """Return the run folder that a verb is for, as an absolute path: the one that the user names, or `find_run_dir`'s.

    Args:
        named: the user's choice.
        environ: this process's environment.
        expected: what is expected where there is none.
        fix: how to name one.

    Raises:
        UsageError: there is none, or several, or the one is refused.
    """
    if (found := named or find_run_dir(environ)) is None:
        raise UsageError(f"no deployment runs in a ./dynamo_mpi-* of {Path.cwd()}", expected=expected, fix=fix)
    return Path(os.path.abspath(found))


@contextlib.contextmanager
def open_used_run_dir(run_dir: Path) -> Iterator[OwnFolder]:
    """Open a run folder in which a deployment was started.

    Raises:
        NoRunDirError: there is none of this name.
        AuthorizationError: it is another user's.
        UsageError: others can write in it, or replace it.
    """
    try:
        with open_run_dir(run_dir) as folder:
            if not is_run_dir(folder):
                raise NoRunDirError(run_dir)
            yield folder
    except (FileNotFoundError, NotADirectoryError):
        raise NoRunDirError(run_dir) from None
    except PermissionError:
        raise AuthorizationError(
            f"{run_dir} can't be used by this user",
            expected="a run folder of this user's",
            fix="ask the user who launched it",
        ) from None
