# SPDX-License-Identifier: Apache-2.0
"""A stand-in for nvidia-ml-py: it serves the GPUs that a JSON file describes, and knows the calls that are made and no others.

``PYNVML_STANDIN`` names the file: ``{"driver": "570.86.15", "cuda": 12080, "gpus": [{"uuid": "GPU-0", "name": "NVIDIA H100 80GB HBM3",
"sm": [9, 0], "total": 1, "free": 1, "used": 0, "processes": [[42, 1]], "mig": 0}]}``.
A GPU may have more: ``"links": [1, 0]``, a state for each NVLink, ``"uncorrected": 0`` memory errors, ``"remapped": [0, 0, 0, 0]`` rows.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NoReturn

nvmlMemory_v2 = 0x02000028
_node: dict[str, Any] = {}


class NVMLError(Exception):
    """As nvidia-ml-py has it: a class for each kind."""


class NVMLError_NotSupported(NVMLError):
    """A GPU that doesn't have it."""


class NVMLError_DriverNotLoaded(NVMLError):
    """There is no file."""


class UnknownCallError(BaseException):
    """No `Exception`: whoever asks for what isn't here would take that for an old driver."""


def __getattr__(name: str) -> NoReturn:
    raise (UnknownCallError if name.startswith("nvml") else AttributeError)(f"pynvml.{name} isn't known here")


def nvmlInit() -> None:
    path = os.environ.get("PYNVML_STANDIN")
    if not path:
        raise NVMLError_DriverNotLoaded("Driver Not Loaded")
    _node.update(json.loads(Path(path).read_text(encoding="utf-8")))


def nvmlShutdown() -> None:
    _node.clear()


def nvmlSystemGetDriverVersion() -> str:
    return str(_node["driver"])


def nvmlSystemGetCudaDriverVersion() -> int:
    return int(_node["cuda"])


def nvmlDeviceGetCount() -> int:
    return len(_node["gpus"])


def nvmlDeviceGetHandleByIndex(index: int) -> dict[str, Any]:
    handle: dict[str, Any] = _node["gpus"][index]
    return handle


def nvmlDeviceGetCudaComputeCapability(handle: dict[str, Any]) -> tuple[int, int]:
    major, minor = handle["sm"]
    return major, minor


def nvmlDeviceGetUUID(handle: dict[str, Any]) -> str:
    return str(handle["uuid"])


def nvmlDeviceGetName(handle: dict[str, Any]) -> str:
    return str(handle["name"])


def nvmlDeviceGetMemoryInfo(handle: dict[str, Any], version: int | None = None) -> SimpleNamespace:
    return SimpleNamespace(total=handle["total"], free=handle["free"], used=handle["used"])


def nvmlDeviceGetMigMode(handle: dict[str, Any]) -> tuple[int, int]:
    return handle["mig"], handle["mig"]


def nvmlDeviceGetComputeRunningProcesses(handle: dict[str, Any]) -> list[SimpleNamespace]:
    return [SimpleNamespace(pid=pid, usedGpuMemory=size) for pid, size in handle["processes"]]


def nvmlDeviceGetNvLinkState(handle: dict[str, Any], link: int) -> int:
    states = handle.get("links", [])
    if link >= len(states):
        raise NVMLError_NotSupported("Not Supported")
    return int(states[link])


def nvmlDeviceGetTotalEccErrors(handle: dict[str, Any], kind: int, counter: int) -> int:
    if (kind, counter) != (1, 0):
        raise UnknownCallError("only uncorrected errors since the driver was loaded are known here")
    return int(handle.get("uncorrected", 0))


def nvmlDeviceGetRemappedRows(handle: dict[str, Any]) -> list[int]:
    return list(handle.get("remapped", [0, 0, 0, 0]))
