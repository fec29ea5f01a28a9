# SPDX-License-Identifier: Apache-2.0
"""``python -m dynamo_mpi.ops.doctor.gpu_child``: reads facts about this node's GPUs and their health by NVML, and writes them as JSON.

In a separate process, because a call about a GPU that has fallen off the bus may hang in the driver.
"""

from __future__ import annotations

import json
import os
from importlib import import_module
from typing import Any

from dynamo_mpi.checks.gpu_facts import device_files, optional, read_gpus

# the largest number of NVLinks of any GPU so far; NVML reports an error for missing ones
_MOST_LINKS = 18
# numbers from nvml.h: older releases of nvidia-ml-py don't have all names
_UNCORRECTED, _VOLATILE = 1, 0


def look() -> dict[str, Any]:
    """Read everything; ``health`` has the fields of `gpus.GpuHealth`."""
    facts = read_gpus(os.environ)
    health = _health() if facts.gpus else []
    return {"facts": facts.pack(), "devices": device_files(), "health": health}


def _health() -> list[dict[str, Any]]:
    nvml: Any = import_module("pynvml")
    nvml.nvmlInit()
    try:
        # by NVML's index: GPUs that a cgroup hides have no health
        handles = [optional(nvml, "nvmlDeviceGetHandleByIndex", index) for index in range(nvml.nvmlDeviceGetCount())]
        return [_one(nvml, index, handle) for index, handle in enumerate(handles) if handle is not None]
    finally:
        optional(nvml, "nvmlShutdown")


def _one(nvml: Any, index: int, handle: Any) -> dict[str, Any]:
    states = [optional(nvml, "nvmlDeviceGetNvLinkState", handle, link) for link in range(_MOST_LINKS)]
    known = [state for state in states if state is not None]
    remapped = optional(nvml, "nvmlDeviceGetRemappedRows", handle)
    return {
        "number": index,
        "links": len(known),
        "links_up": sum(bool(state) for state in known),
        "uncorrected": optional(nvml, "nvmlDeviceGetTotalEccErrors", handle, _UNCORRECTED, _VOLATILE) or 0,
        # corrected, uncorrected, pending, failed
        "remap_pending": bool(remapped and remapped[2]),
        "remap_failed": bool(remapped and remapped[3]),
    }


if __name__ == "__main__":
    print(json.dumps(look()))
