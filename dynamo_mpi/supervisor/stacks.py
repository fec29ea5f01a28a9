# SPDX-License-Identifier: Apache-2.0
"""The stacks of this process's threads as text, and a short summary of many ranks' stacks."""

from __future__ import annotations

import sys
import threading

from dynamo_mpi.common.light_typing import TYPE_CHECKING
from dynamo_mpi.common.process import activity, format_frames

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

_FRAMES = 12
_THREADS = 4
_GROUP_FRAMES = 2
# threads of this project that only wait
IDLE_THREADS = frozenset(
    {
        *("watch", "child output", "child end", "proof", "session", "signals", "record", "registration", "time limit"),
        *("progress", "events", "failure records", "metrics", "health", "timeline"),
    }
)
# frames that only run a task say nothing about the task
_EXECUTOR_FILES = (
    "/mpi4py/futures/",
    "/concurrent/futures/",
    "/threading.py",
    "/grpc/",
    "<frozen runpy>",
    "/dynamo_mpi/engines/trtllm/",
    *(
        f"/dynamo_mpi/{name}.py"
        for name in (
            "worker",
            "runtime/main",
            "runtime/leader",
            "runtime/follower",
            "runtime/trtllm_runner",
            "mpi/world",
        )
    ),
)


def dump_stacks() -> str:
    """Return this process's activity and the innermost Python frames of its threads, the main thread first, without those of executors."""
    current = activity()
    return f"{current}\n{_frames()}" if current else _frames()


def _frames() -> str:
    frames = sys._current_frames()
    main = threading.main_thread()
    threads = sorted(threading.enumerate(), key=lambda thread: thread is not main)
    stacks = {
        thread.name: format_frames(frames[thread.ident])
        for thread in threads
        if thread.ident in frames and thread.name not in IDLE_THREADS
    }
    relevant = {
        name: kept
        for name, lines in stacks.items()
        if (kept := [line for line in lines if not _is_executor_frame(line)])
    }
    shown = list((relevant or stacks).items())[:_THREADS]
    if len(shown) == 1:
        return "\n".join(shown[0][1][:_FRAMES])
    return "\n".join(f"thread {name}:\n  " + "\n  ".join(lines[:_FRAMES]) for name, lines in shown)


def _is_executor_frame(line: str) -> bool:
    return any(name in line.partition(" in ")[0] for name in _EXECUTOR_FILES)


def describe_stacks(stacks: Mapping[int, str], silent: Sequence[int], name: Callable[[Sequence[int]], str]) -> str:
    """Group ranks with the same stack, the smallest groups first: usually the other ranks wait for these.

    Args:
        stacks: the ranks' stacks.
        silent: ranks that didn't answer.
        name: returns the names of ranks with their hosts.
    """
    groups: dict[tuple[str, ...], list[int]] = {}
    for rank, text in sorted(stacks.items()):
        groups.setdefault(tuple(text.splitlines()[:_GROUP_FRAMES]), []).append(rank)
    parts = []
    if silent:
        parts.append(
            f"{name(silent)}: no answer; Python is blocked there in native code, or the process is stopped or gone"
        )
    for ranks in sorted(groups.values(), key=len):
        parts.append(f"{name(ranks)}:\n" + "\n".join("  " + line for line in stacks[ranks[0]].splitlines()))
    return "\n".join(parts)
