# SPDX-License-Identifier: Apache-2.0
"""What the operating system refuses, as errors with a fix: no space, no more processes, a current folder that was removed."""

from __future__ import annotations

import errno
import os
import sys

from dynamo_mpi.common.errors import DynamoMpiError, EngineError, UsageError
from dynamo_mpi.common.light_typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

_NO_SPACE = (errno.ENOSPC, errno.EDQUOT)
_NO_FILES = (errno.EMFILE, errno.ENFILE)
# errors of processes that couldn't start another process or thread, in their logs
_NO_PROCESS_TEXTS = (
    "resource temporarily unavailable",
    "can't start new thread",
    "failed to create new os thread",
    "pthread_create failed",
    "progress_thread_start failed",
)
# less is as good as nothing: etcd alone reserves 64 MB at a time
_FULL_BYTES = 1 << 20


def of_os_error(error: OSError) -> DynamoMpiError:
    """Return the error, with its cause and fix, for an `OSError` that no caller has handled."""
    where = f"{os.fsdecode(error.filename)}: " if isinstance(error.filename, (str, bytes)) else ""
    if is_folder_gone(error):
        return UsageError(
            "the current folder doesn't exist any more, so relative paths lead nowhere",
            expected="a current folder that exists",
            fix="cd to one",
        )
    if error.errno in _NO_SPACE:
        return UsageError(
            f"{where}no space is left",
            expected="space for this run's files",
            fix="free some, or choose another file system: TMPDIR for temporary files, --run-dir for a deployment's",
        )
    if error.errno == errno.EAGAIN:
        return no_more_processes()
    if error.errno in _NO_FILES:
        return UsageError(f"{where}too many open files", expected="a higher limit", fix="raise it: ulimit -n")
    kind = "network" if isinstance(error, (ConnectionError, TimeoutError)) else "file system"
    return EngineError(
        f"{kind} error: {where}{error.strerror or error}",
        expected="a file system and a network that answer",
        fix="check its path, rights and state",
    )


def no_more_processes() -> UsageError:
    """Return the error for a process or thread that can't be started."""
    import resource  # takes a millisecond

    limit = resource.getrlimit(resource.RLIMIT_NPROC)[0]
    return UsageError(
        "no further process or thread can be started",
        expected="a limit of processes above what this user runs, all sessions together"
        + ("" if limit == resource.RLIM_INFINITY else f"; it is {limit}"),
        fix="raise the limit (ulimit -u; pids.max of a container), or end other processes of this user",
    )


def import_numpy() -> None:
    """Import numpy.

    Raises:
        UsageError: its OpenBLAS can't start its threads. It then sends this thread SIGINT, which would pass for Ctrl-C.
        ImportError: there is none.
    """
    if "numpy" in sys.modules:
        return
    import signal

    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        import numpy  # noqa: F401 - the import itself starts BLAS's threads

        sent = signal.sigtimedwait({signal.SIGINT}, 0)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    if sent is not None and sent.si_pid == os.getpid():
        raise no_more_processes()
    if sent is not None:
        os.kill(os.getpid(), signal.SIGINT)


def exhausted(folder: Path, log: str) -> str:
    """Return what a process that has ended may have lacked, as a fix; empty if nothing shows it.

    Args:
        folder: the folder to which it wrote.
        log: its output.
    """
    try:
        state = os.statvfs(folder)
    except OSError:
        return ""
    if state.f_bavail * state.f_frsize < _FULL_BYTES:
        return f"the file system of {folder} is full: free some of it, or set TMPDIR to a folder with more"
    if any(text in log.lower() for text in _NO_PROCESS_TEXTS):
        error = no_more_processes()
        return f"{error.problem}: {error.fix}"
    return ""


def is_folder_gone(error: BaseException) -> bool:
    """Return whether the error is that this process's current folder was removed."""
    if not isinstance(error, FileNotFoundError):
        return False
    try:
        os.getcwd()
    except OSError:
        return True
    return False
