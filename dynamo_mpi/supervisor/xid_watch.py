# SPDX-License-Identifier: Apache-2.0
"""Listens for Xids of a node's GPUs, in the node's agent: NVML reports them to processes that listen when they happen, and keeps none.

A thread waits inside NVML, so that nothing wakes up as long as nothing happens, and an NVML that hangs holds up nothing else. It begins after
the preflight's result, if the ranks use GPUs; where NVML can't be used at all, nothing is listened for, as the preflight has said already.
"""

from __future__ import annotations

import queue
import selectors
import time
from ctypes import addressof

from dynamo_mpi.common.light_typing import TYPE_CHECKING, Any
from dynamo_mpi.common.waiting import start_thread
from dynamo_mpi.common.xids import GpuError, needs_repair
from dynamo_mpi.supervisor.agent_socket import warn
from dynamo_mpi.supervisor.frame_connection import Waker

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

# NVML's largest
_WAIT_MS = 0xFFFFFFFF


class XidWatch:
    """Listens from its creation on, until the process ends.

    Args:
        selector: the agent's selector, in whose thread ``note`` is called.
        host: this node.
        uuids: the GPUs.
        note: called with each Xid, as `GpuError.as_document` encodes it.
    """

    def __init__(
        self,
        selector: selectors.BaseSelector,
        host: str,
        uuids: Sequence[str],
        note: Callable[[dict[str, Any]], object],
    ) -> None:
        self._host, self._uuids, self._note = host, uuids, note
        self._seen: queue.SimpleQueue[GpuError] = queue.SimpleQueue()
        self._waker = Waker()
        selector.register(self._waker, selectors.EVENT_READ, self._hand_over)
        start_thread(self._listen, "xids")

    def _hand_over(self) -> None:
        self._waker.clear()
        while not self._seen.empty():
            self._note(self._seen.get().as_document(time.monotonic()))

    def _listen(self) -> None:
        # the agent needs it for nothing else
        from importlib import import_module

        nvml: Any = import_module("pynvml")
        nvml.nvmlInit()
        events, gpus = nvml.nvmlEventSetCreate(), {}
        for uuid in self._uuids:
            try:
                handle = nvml.nvmlDeviceGetHandleByUUID(uuid)
                nvml.nvmlDeviceRegisterEvents(handle, nvml.nvmlEventTypeXidCriticalError, events)
                # NVML may say nothing more of a GPU that is lost
                gpus[addressof(handle.contents)] = nvml.nvmlDeviceGetIndex(handle), uuid
            except nvml.NVMLError as error:
                warn(f"Xids of {uuid} aren't listened for: NVML: {error}", self._host)
        try:
            while True:
                self._wait(nvml, events, gpus)
        except nvml.NVMLError as error:
            warn(f"Xids of this node's GPUs aren't listened for any longer: NVML: {error}", self._host)

    def _wait(self, nvml: Any, events: Any, gpus: Mapping[int, tuple[int, str]]) -> None:
        """Wait for an Xid, and hand it over."""
        try:
            event = nvml.nvmlEventSetWait_v2(events, _WAIT_MS)
        except nvml.NVMLError_Timeout:
            return
        # NVML may name no GPU
        number, uuid = gpus.get(addressof(event.device.contents), (-1, "")) if event.device else (-1, "")
        error = GpuError(int(event.eventData), number, uuid, self._host, time.monotonic())
        self._seen.put(error)
        self._waker.wake()
        fix = ": it computes again after a reset or a repair (nvidia-smi -q, dmesg)" if needs_repair(error.xid) else ""
        warn(f"the NVIDIA driver reports {error}{fix}", self._host)
