# SPDX-License-Identifier: Apache-2.0
"""Finds and ends what a rank has started and left behind, in whatever session and process group, and nothing else.

A process that was started anew (``exec``) is known by the mark that the rank put into its own environment, one that was only forked by the
rank's connection to its node agent, which it has inherited: both also where its parent has gone, and neither can be had by chance.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

MARK_VARIABLE = "DYN_MPI_RANK_MARK"
_MOST_ROUNDS = 5
_GRACE_SECONDS = 0.3
_LOOK_SECONDS = 0.05


def end_descendants(mark: str, inode: int, spare: frozenset[int] = frozenset()) -> list[int]:
    """Kill what is left of a rank that has ended, and return the pids. Does not raise.

    Args:
        mark: the value of `MARK_VARIABLE` in its environment; empty for none.
        inode: of its connection to the node agent; 0 where it isn't known.
        spare: pids that stay whatever they look like.
    """
    ended: list[int] = []
    # Python's own helpers clean up, and end, once they see that the rank has gone
    end = time.monotonic() + _GRACE_SECONDS
    while any(pid not in spare for pid in _descendants(mark, inode)) and time.monotonic() < end:
        time.sleep(_LOOK_SECONDS)
    # one that forks while we look is found in the next round
    for _ in range(_MOST_ROUNDS):
        found = [pid for pid in _descendants(mark, inode) if pid not in spare and pid not in ended]
        for pid in found:
            with contextlib.suppress(OSError):
                os.kill(pid, signal.SIGKILL)
        ended += found
        if not found:
            break
    return ended


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
