# SPDX-License-Identifier: Apache-2.0
"""What a killed rank leaves on its node: processes that it started, compile caches, temporary folders, and MPI's segments in /dev/shm.
Nothing else is ended or removed.

A process that called ``exec`` is identified by the mark that the rank put into its own environment; one that was only forked, by the rank's
connection to its node agent, which it inherited. Both work even if the parent is gone, and no foreign process has them by chance.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time

from dynamo_mpi.common.light_typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator


MARK_VARIABLE = "DYN_MPI_RANK_MARK"
_MAX_ROUNDS = 5
_GRACE_SECONDS = 0.3
_POLL_SECONDS = 0.05


def end_descendants(mark: str, inode: int, excluded: frozenset[int] = frozenset()) -> list[int]:
    """Kill the remaining descendants of a rank that has exited, and return their pids. Does not raise.

    Args:
        mark: the value of `MARK_VARIABLE` in its environment; empty for none.
        inode: inode of the rank's connection to the node agent; 0 if it isn't known.
        excluded: pids that are never killed.
    """
    ended: list[int] = []
    # Python's helper processes clean up and exit when they notice that the rank is gone
    end = time.monotonic() + _GRACE_SECONDS
    while any(pid not in excluded for pid in _descendants(mark, inode)) and time.monotonic() < end:
        time.sleep(_POLL_SECONDS)
    # several rounds, because a process may fork during a scan
    for _ in range(_MAX_ROUNDS):
        found = [pid for pid in _descendants(mark, inode) if pid not in excluded and pid not in ended]
        for pid in found:
            with contextlib.suppress(OSError):
                os.kill(pid, signal.SIGKILL)
        ended += found
        if not found:
            break
    return ended


def clear_after(mark: str, inode: int, excluded: frozenset[int], caches: str) -> None:
    """Kill the remaining descendants of a rank that has exited, then remove its folder of compile caches. Does not raise.

    Args:
        mark: as in `end_descendants`.
        inode: likewise.
        excluded: likewise.
        caches: the folder; empty for none.
    """
    end_descendants(mark, inode, excluded)
    if caches:
        from dynamo_mpi.common.claimed_folder import remove_claimed

        remove_claimed(caches)


def _descendants(mark: str, inode: int) -> Iterator[int]:
    entry = f"{MARK_VARIABLE}={mark}".encode() if mark else b""
    link = f"socket:[{inode}]" if inode else ""
    try:
        pids = [int(name) for name in os.listdir("/proc") if name.isdecimal()]
    except OSError:
        return
    own = os.getuid()
    for pid in pids:
        if pid == os.getpid():
            continue
        with contextlib.suppress(OSError):
            folder = f"/proc/{pid}"
            if os.stat(folder).st_uid == own and (_is_marked(folder, entry) or _holds(folder, link)):
                yield pid


def _is_marked(folder: str, entry: bytes) -> bool:
    if not entry:
        return False
    try:
        with open(f"{folder}/environ", "rb") as file:
            return entry in file.read().split(b"\0")
    except OSError:
        return False


def _holds(folder: str, link: str) -> bool:
    if not link:
        return False
    for name in os.listdir(f"{folder}/fd"):
        with contextlib.suppress(OSError):
            if os.readlink(f"{folder}/fd/{name}") == link:
                return True
    return False


_FOLDER = "/dev/shm/"  # noqa: S108 - not a temporary file: MPI's shared memory
# of ranks under MPICH, whose transport may be UCX
_MPICH_PREFIXES = ("mpich_shm_", "ucx_shm_posix_")
# Open MPI 5's and 4's
_PREFIXES = (*_MPICH_PREFIXES, "sm_segment.", "vader_segment.")


def clear_after_ranks(segments: frozenset[str], lost_since: float | None, *, mpich: bool) -> None:
    """Remove what a node's ranks have left, now that all have exited; usually the launcher removes it.

    Args:
        segments: their shared memory.
        lost_since: if ranks were lost, when the first of them began, in seconds since 1970.
        mpich: whether they ran under MPICH.
    """
    remove_segments(segments)
    if lost_since is None:
        return
    remove_temporary_folders()
    if mpich:
        # of ranks that were killed in MPI_Init, before it was known what they had made
        remove_segments(unused_segments(lost_since))


def segments_of(pid: int) -> frozenset[str]:
    """Return the MPI shared memory files that a process has mapped. Does not raise."""
    mapped = _mapped_files(f"/proc/{pid}", _FOLDER)
    return frozenset(path for path in mapped if path.removeprefix(_FOLDER).startswith(_PREFIXES))


def unused_segments(since: float) -> frozenset[str]:
    """Return MPICH's shared memory files of this user that no visible process uses any more. Does not raise.

    Processes of other PID namespaces aren't visible. UCX in its default (``UCX_POSIX_USE_PROC_LINK=y``) removes a file's name as soon as it
    has the file, so that only those of killed processes remain.

    Args:
        since: only those made after this time, in seconds since 1970.
    """
    found = set()
    with contextlib.suppress(OSError):
        for name in os.listdir(_FOLDER):
            with contextlib.suppress(OSError):
                status = os.lstat(_FOLDER + name)
                if name.startswith(_MPICH_PREFIXES) and status.st_uid == os.getuid() and status.st_ctime >= since:
                    found.add(_FOLDER + name)
    return frozenset(found - paths_in_use(_FOLDER)) if found else frozenset()


def paths_in_use(folder: str) -> set[str]:
    """Return the files in the folder that visible processes have mapped or open. Does not raise."""
    start = folder.rstrip("/") + "/"
    found: set[str] = set()
    with contextlib.suppress(OSError):
        for name in os.listdir("/proc"):
            if name.isdecimal():
                with contextlib.suppress(OSError):  # another user's, or it has ended
                    for one in os.listdir(f"/proc/{name}/fd"):
                        with contextlib.suppress(OSError):
                            found.add(os.readlink(f"/proc/{name}/fd/{one}"))
                # after what is open: MPI maps a file, then closes it
                found |= _mapped_files(f"/proc/{name}", start)
    return {path for path in found if path.startswith(start)}


def _mapped_files(process: str, start: str) -> set[str]:
    found = set()
    with contextlib.suppress(OSError), open(f"{process}/maps", encoding="utf-8", errors="surrogateescape") as file:
        for line in file:
            if (path := mapped_path(line)).startswith(start):
                found.add(path)
    return found


def mapped_path(line: str) -> str:
    """Return the file of a line of ``/proc/PID/maps``; empty if there is none."""
    fields = line.rstrip("\n").split(maxsplit=5)
    return fields[5] if len(fields) == 6 else ""


def remove_segments(paths: frozenset[str]) -> None:
    """Remove those that still exist and belong to this user. Does not raise."""
    for path in paths:
        with contextlib.suppress(OSError):
            if (
                path.startswith(tuple(_FOLDER + prefix for prefix in _PREFIXES))
                and os.lstat(path).st_uid == os.getuid()
            ):
                os.unlink(path)


def remove_temporary_folders() -> None:
    """Remove what ranks of this user that have ended left in the folder of temporary files. Does not raise."""
    with contextlib.suppress(OSError):
        # not before: what an agent imports delays its watch
        import tempfile
        from pathlib import Path

        from dynamo_mpi.common.files import FLASHINFER_PREFIX, SESSION_PREFIX, sweep

        for prefix in (FLASHINFER_PREFIX, SESSION_PREFIX):
            sweep(Path(tempfile.gettempdir()), prefix)
