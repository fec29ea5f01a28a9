# SPDX-License-Identifier: Apache-2.0
"""Where the threads of this process are, as text, and many ranks' stacks as one short report."""

from __future__ import annotations

import sys
import threading
from typing import TYPE_CHECKING

from dynamo_mpi.common.activity import activity
from dynamo_mpi.common.frames import format_frames

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

_FRAMES = 12
_THREADS = 4
_SAME_FRAMES = 2
# those of ours that only wait, on every rank, whatever happens
IDLE_THREADS = frozenset(
    {
        *("watch", "child output", "child end", "proof", "session", "signals", "record", "registration", "time limit"),
        *("progress", "events", "failure records", "metrics", "probes", "timeline"),
    }
)
# what carries a task to a thread says nothing of where the task is
_CARRIERS = (
    "/mpi4py/futures/",
    "/concurrent/futures/",
    "/threading.py",
    "/grpc/",
    "<frozen runpy>",
    "/dynamo_mpi/engines/trtllm/",
    *(
        f"/dynamo_mpi/{name}.py"
        for name in ("worker", "runtime/main", "runtime/leader", "runtime/follower", "mpi/world")
    ),
)


def dump_stacks() -> str:
    """Return what this process says it is doing, and the innermost Python frames of its threads, the main one first; of threads that only
    carry tasks, the tasks'."""
    said = activity()
    return f"{said}\n{_frames()}" if said else _frames()


def _frames() -> str:
    frames = sys._current_frames()
    main = threading.main_thread()
    threads = sorted(threading.enumerate(), key=lambda thread: thread is not main)
    stacks = {
        thread.name: format_frames(frames[thread.ident])
        for thread in threads
        if thread.ident in frames and thread.name not in IDLE_THREADS
    }
    telling = {name: kept for name, lines in stacks.items() if (kept := [line for line in lines if not _carries(line)])}
    shown = list((telling or stacks).items())[:_THREADS]
    if len(shown) == 1:
        return "\n".join(shown[0][1][:_FRAMES])
    return "\n".join(f"thread {name}:\n  " + "\n  ".join(lines[:_FRAMES]) for name, lines in shown)


def _carries(line: str) -> bool:
    return any(name in line.partition(" in ")[0] for name in _CARRIERS)


def describe_stacks(stacks: Mapping[int, str], silent: Sequence[int], name: Callable[[Sequence[int]], str]) -> str:
    """Put ranks that stand at the same place together, the odd ones out first: most of them wait for these.

    Args:
        stacks: what ranks answered.
        silent: ranks that didn't.
        name: names ranks with their hosts.
    """
    groups: dict[tuple[str, ...], list[int]] = {}
    for rank, text in sorted(stacks.items()):
        groups.setdefault(tuple(text.splitlines()[:_SAME_FRAMES]), []).append(rank)
    parts = []
    if silent:
        parts.append(
            f"{name(silent)}: no answer; Python is blocked there in native code, or the process is stopped or gone"
        )
    for ranks in sorted(groups.values(), key=len):
        parts.append(f"{name(ranks)}:\n" + "\n".join("  " + line for line in stacks[ranks[0]].splitlines()))
    return "\n".join(parts)
