# SPDX-License-Identifier: Apache-2.0
"""What compiles while the real one loads: kernels that Triton keeps, and tactics that the autotuner does.

With ``STANDIN_TRTLLM_KERNELS=N`` each rank needs N kernels. What is in ``TRITON_CACHE_DIR`` is loaded, the rest is made and written as Triton
does: a file under a temporary name, renamed, and a list of the group's files by their absolute paths. The autotuner's file has a member for
each rank; the real one raises if the file is there without this rank's (``autotuner.py:load_cache``), and so does this one.
With ``STANDIN_TRTLLM_TORN_TACTICS=R`` rank R's file is written in part, as by a process that is killed meanwhile.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path


def compile_kernels(rank: int) -> None:
    """Load or make this rank's kernels, and print how many of each."""
    count = int(os.environ.get("STANDIN_TRTLLM_KERNELS") or 0)
    if not count:
        return
    loaded = sum(_get(rank, number) for number in range(count))
    tuned = _tune(rank)
    where = os.environ.get("TRITON_CACHE_DIR", "nowhere")
    line = f"stand-in kernels: rank {rank} loaded {loaded}, made {count - loaded}, {tuned}, in {where}"
    print(line, file=sys.stderr, flush=True)


def _get(rank: int, number: int) -> bool:
    """Return whether a kernel was there; otherwise make it."""
    folder = Path(os.environ["TRITON_CACHE_DIR"]) / f"KERNEL{number}OF{rank}"
    group, kernel = folder / "__grp__kernel.json", folder / "kernel.cubin"
    if group.exists():
        paths = json.loads(group.read_text())["child_paths"].values()
        # Triton leaves out what doesn't exist, and compiles if that was all
        if any(os.path.exists(path) for path in paths):
            return True
    folder.mkdir(parents=True, exist_ok=True)
    for path, content in ((kernel, "code\n" * 1000), (group, json.dumps({"child_paths": {kernel.name: str(kernel)}}))):
        temporary = folder / f"tmp.pid_{os.getpid()}"
        temporary.write_text(content)
        os.replace(temporary, path)
    return False


def _tune(rank: int) -> str:
    path = os.environ.get("TLLM_AUTOTUNER_CACHE_PATH")
    if path is None:
        return "not tuned"
    known = {}
    if os.path.exists(path):
        known = json.loads(Path(path).read_text())
        if f"rank_{rank}" not in known:
            raise AssertionError(f"Rank {rank} cache not found in {path}")
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(known | {f"rank_{rank}": {"gemm": 3}})
    torn = os.environ.get("STANDIN_TRTLLM_TORN_TACTICS") == str(rank)
    Path(path).write_text(text[: len(text) // 2] if torn else text)
    return "tactics loaded" if known else "tuned"
