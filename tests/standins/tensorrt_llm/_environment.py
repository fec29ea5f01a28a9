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
_FAULTS = {"raise": int, "leave": int, "hang": int, "die": int, "slow": float, "lose-lease": float, "unhealthy": float}


def reports_worker_death() -> bool:
    """Whether this version tells the proxy of a worker that failed, and checks the size of a session."""
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


def suffer_while_loading(rank: int) -> None:
    """Do what the fault says for this rank."""
    time.sleep(fault("slow") or 0.0)
    if rank in (fault("raise"), fault("die"), fault("hang")):
        # for who measures what happens from here on
        print(f"stand-in fault: now, rank {rank}", file=sys.stderr, flush=True)
    if fault("raise") == rank:
        raise RuntimeError(f"stand-in fault: rank {rank} can't load")
    if fault("die") == rank:
        os._exit(3)
    if fault("hang") == rank:
        threading.Event().wait()
