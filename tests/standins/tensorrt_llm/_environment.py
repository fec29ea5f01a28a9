# SPDX-License-Identifier: Apache-2.0
"""What the stand-in's own environment variables ask for."""

from __future__ import annotations

import os
import re
import sys
import threading
import time


def _role() -> str:
    """Return the role that dynamo.trtllm was started for, in the words of the reference engine."""
    flag = "--disaggregation-mode"
    asked = sys.argv[sys.argv.index(flag) + 1] if flag in sys.argv[:-1] else ""
    return asked if asked in ("prefill", "decode") else "agg"


ROLE = _role()
VERSION = os.environ.get("STANDIN_TRTLLM_VERSION", "1.3.0rc22")
ALL = -1.0
_FAULTS = {
    **dict.fromkeys(
        ("raise", "fail", "hang", "die", "crash", "stick"), lambda text: ALL if text == "all" else int(text)
    ),
    **dict.fromkeys(("slow", "lose-lease", "unhealthy", "nan"), float),
}


def reports_worker_death() -> bool:
    """Whether this version informs the proxy of a worker that failed, and checks the size of a session."""
    numbers = re.match(r"(\d+)\.(\d+)", VERSION)
    if numbers is None:
        raise ValueError(f"STANDIN_TRTLLM_VERSION is {VERSION!r}, which is no version")
    return tuple(map(int, numbers.groups())) >= (1, 4)


def fault(kind: str) -> float | None:
    """Return the number behind a fault, if it is the one asked for."""
    asked = os.environ.get("STANDIN_TRTLLM_FAULT")
    if not asked:
        return None
    name, _, value = asked.partition(":")
    if name not in _FAULTS:
        raise ValueError(f"STANDIN_TRTLLM_FAULT is {asked!r}; there are {', '.join(_FAULTS)}")
    number = _FAULTS[name](value)
    return number if name == kind else None


def strikes(kind: str, rank: int) -> bool:
    """Return whether this fault is the one asked for, and for this rank."""
    return fault(kind) in (rank, ALL)


def configure_cpu_affinity() -> None:
    """Unbind the main thread, as the real worker does with a rank that launcher or user have bound, unless a variable says what to do."""
    said = os.environ.get("TLLM_NUMA_AWARE_WORKER_AFFINITY")
    if said == "1":
        raise NotImplementedError("the stand-in binds no rank")
    everything = set(range(os.cpu_count() or 1))
    if said is None and os.sched_getaffinity(0) != everything:
        os.sched_setaffinity(os.getpid(), everything)


def suffer_before_loading(rank: int) -> None:
    """Raise where the real worker's task does, before it builds its engine."""
    if strikes("raise", rank):
        _say(rank)
        raise RuntimeError(f"stand-in fault: rank {rank} can't load")


def seconds_of(name: str) -> float:
    """Return the seconds in a variable, or 0."""
    return float(os.environ.get(name) or 0)


def _say(rank: int) -> None:
    # for who measures what happens from here on
    print(f"stand-in fault: now, rank {rank}", file=sys.stderr, flush=True)


def suffer_while_loading(rank: int) -> None:
    """Do what the fault says for this rank."""
    time.sleep(fault("slow") or 0.0)
    if any(strikes(kind, rank) for kind in ("fail", "die", "hang")):
        _say(rank)
    if strikes("fail", rank):
        raise ValueError(f"stand-in fault: rank {rank} has no memory left")
    if strikes("die", rank):
        os._exit(3)
    if strikes("hang", rank):
        threading.Event().wait()
