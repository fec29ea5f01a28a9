# SPDX-License-Identifier: Apache-2.0
"""A stand-in for nvidia-ml-py: it serves the GPUs that a JSON file describes, and knows the calls that are made and no others.

``PYNVML_STANDIN`` names the file: ``{"driver": "570.86.15", "cuda": 12080, "gpus": [{"uuid": "GPU-0", "name": "NVIDIA H100 80GB HBM3",
"sm": [9, 0], "total": 1, "free": 1, "used": 0, "processes": [[42, 1]], "mig": 0}]}``. A GPU may also say how it is: ``recovery_action``,
``ecc``, ``uncorrected``, ``remapped``, ``reasons``, ``nvlinks``, ``compute_mode``, ``clocks``, ``power_limit``, ``pcie``,
``address`` (its PCI bus id), ``numa`` (the node that its own memory is), ``instances`` (UUIDs),
``fabric`` (``{"state": 3, "status": 0, "cluster": "<32 hexadecimal digits>", "clique": 1, "health": 170}``); else all is well, without a
fabric.
The file is read again by every call that asks for memory, so that memory may be given back, and while events are waited for:
``"xids": [["GPU-0", 79]]`` beside the GPUs has the Xids that have happened since somebody listens.
"""

from __future__ import annotations

import ctypes
import json
import os
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar, NoReturn

nvmlMemory_v2 = 0x02000028
NVML_FI_DEV_GET_GPU_RECOVERY_ACTION = 230
nvmlEventTypeXidCriticalError = 8
_node: dict[str, Any] = {}


class NVMLError(Exception):
    """As nvidia-ml-py has it: a class for each kind."""


class NVMLError_DriverNotLoaded(NVMLError):
    """There is no file."""


class NVMLError_NotSupported(NVMLError):
    """The GPU has no such thing."""


class NVMLError_InvalidArgument(NVMLError):
    """There is no such link."""


class NVMLError_NotFound(NVMLError):
    """There is no such GPU."""


class NVMLError_Timeout(NVMLError):
    """No event has come in time."""


class UnknownCallError(BaseException):
    """No `Exception`: a caller of what isn't here would take that for an old driver."""


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
    _node.update(json.loads(Path(os.environ["PYNVML_STANDIN"]).read_text(encoding="utf-8")))
    handle = next(gpu for gpu in _node["gpus"] if gpu["uuid"] == handle["uuid"])
    return SimpleNamespace(total=handle["total"], free=handle["free"], used=handle["used"])


def nvmlDeviceGetMigMode(handle: dict[str, Any]) -> tuple[int, int]:
    return handle["mig"], handle["mig"]


def nvmlDeviceGetPciInfo(handle: dict[str, Any]) -> SimpleNamespace:
    number = _node["gpus"].index(handle)
    return SimpleNamespace(busId=handle.get("address", f"00000000:{number + 0xA0:02X}:00.0"))


def nvmlDeviceGetNumaNodeId(handle: dict[str, Any]) -> int:
    if "numa" not in handle:
        raise NVMLError_NotSupported("Not Supported")
    return int(handle["numa"])


def nvmlDeviceGetMigDeviceHandleByIndex(handle: dict[str, Any], index: int) -> dict[str, Any]:
    instances = handle.get("instances", [])
    if index >= len(instances):
        raise NVMLError_InvalidArgument("Invalid Argument")
    return {"uuid": instances[index]}


def nvmlDeviceGetComputeRunningProcesses(handle: dict[str, Any]) -> list[SimpleNamespace]:
    return [SimpleNamespace(pid=pid, usedGpuMemory=size) for pid, size in handle["processes"]]


def nvmlDeviceGetFieldValues(handle: dict[str, Any], fields: list[int]) -> list[SimpleNamespace]:
    assert fields == [NVML_FI_DEV_GET_GPU_RECOVERY_ACTION]
    return [SimpleNamespace(nvmlReturn=0, value=SimpleNamespace(uiVal=handle.get("recovery_action", 0)))]


def nvmlDeviceGetEccMode(handle: dict[str, Any]) -> tuple[int, int]:
    mode = handle.get("ecc", 1)
    return mode, mode


def nvmlDeviceGetTotalEccErrors(handle: dict[str, Any], kind: int, counter: int) -> int:
    assert (kind, counter) == (1, 0), "uncorrected ones, since the driver's start"
    return int(handle.get("uncorrected", 0))


def nvmlDeviceGetRemappedRows(handle: dict[str, Any]) -> tuple[int, int, int, int]:
    corrected, uncorrected, pending, failed = handle.get("remapped", (0, 0, 0, 0))
    return corrected, uncorrected, pending, failed


def nvmlDeviceGetCurrentClocksEventReasons(handle: dict[str, Any]) -> int:
    return int(handle.get("reasons", 1))


def nvmlDeviceGetNvLinkState(handle: dict[str, Any], link: int) -> int:
    states = handle.get("nvlinks", [1] * 18)
    if link >= len(states):
        raise NVMLError_InvalidArgument("Invalid Argument")
    return int(states[link])


class c_nvmlGpuFabricInfo_v2_t(ctypes.Structure):
    """As nvml.h has it."""

    _fields_ = (
        ("version", ctypes.c_uint),
        ("clusterUuid", ctypes.c_uint8 * 16),
        ("status", ctypes.c_uint),
        ("cliqueId", ctypes.c_uint32),
        ("state", ctypes.c_uint),
        ("healthMask", ctypes.c_uint32),
    )

    def __init__(self) -> None:
        super().__init__(version=0x02000024)


def nvmlDeviceGetGpuFabricInfoV(handle: dict[str, Any], pointer: Any) -> int:
    info, fabric = pointer.contents, handle.get("fabric", {})
    assert (info.version, ctypes.sizeof(info)) == (0x02000024, 0x24), "its version says its size"
    info.state, info.status = fabric.get("state", 0), fabric.get("status", 0)
    info.cliqueId, info.healthMask = fabric.get("clique", 0), fabric.get("health", 0)
    info.clusterUuid[:] = bytes.fromhex(fabric.get("cluster", "00" * 16))
    return 0


def nvmlDeviceGetComputeMode(handle: dict[str, Any]) -> int:
    return int(handle.get("compute_mode", 0))


def nvmlDeviceGetMaxClockInfo(handle: dict[str, Any], kind: int) -> int:
    return int(handle.get("clocks", {"1": 1980, "2": 2619})[str(kind)])


def nvmlDeviceGetEnforcedPowerLimit(handle: dict[str, Any]) -> int:
    return int(handle.get("power_limit", 700000))


def nvmlDeviceGetMaxPcieLinkGeneration(handle: dict[str, Any]) -> int:
    return int(handle.get("pcie", (5, 16))[0])


def nvmlDeviceGetCurrPcieLinkWidth(handle: dict[str, Any]) -> int:
    return int(handle.get("pcie", (5, 16))[1])


class Handle(dict[str, Any]):
    """A GPU's handle, which is a pointer: two of one GPU point to the same."""

    _targets: ClassVar[dict[str, ctypes.c_byte]] = {}

    @property
    def contents(self) -> ctypes.c_byte:
        return self._targets.setdefault(self["uuid"], ctypes.c_byte())


def nvmlDeviceGetHandleByUUID(uuid: str) -> Handle:
    for gpu in _node["gpus"]:
        if gpu["uuid"] == uuid:
            return Handle(gpu)
    raise NVMLError_NotFound("Not Found")


def nvmlDeviceGetIndex(handle: Handle) -> int:
    return [gpu["uuid"] for gpu in _node["gpus"]].index(handle["uuid"])


class EventSet:
    """Registered GPUs, and how many events have been handed out."""

    def __init__(self) -> None:
        self.uuids: set[str] = set()
        self.seen = 0


def nvmlEventSetCreate() -> EventSet:
    return EventSet()


def nvmlDeviceRegisterEvents(handle: Handle, kinds: int, events: EventSet) -> None:
    assert kinds == nvmlEventTypeXidCriticalError
    events.uuids.add(handle["uuid"])


def nvmlEventSetWait_v2(events: EventSet, milliseconds: int) -> SimpleNamespace:
    end = time.monotonic() + milliseconds / 1000
    while True:
        content = json.loads(Path(os.environ["PYNVML_STANDIN"]).read_text(encoding="utf-8"))
        for uuid, xid in content.get("xids", [])[events.seen :]:
            events.seen += 1
            if uuid in events.uuids:
                return SimpleNamespace(
                    eventType=nvmlEventTypeXidCriticalError, eventData=xid, device=nvmlDeviceGetHandleByUUID(uuid)
                )
        if time.monotonic() >= end:
            raise NVMLError_Timeout("Timeout")
        time.sleep(0.02)
