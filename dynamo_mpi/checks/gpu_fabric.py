# SPDX-License-Identifier: Apache-2.0
"""A GPU's place in an NVLink fabric, as NVML shows it: whether the GPU has joined, its cluster and clique, and its health.

Within a node of NVSwitches (HGX) the cluster is zero; over nodes (NVL72) cluster and clique together name the GPUs that NVLink joins: cliques
of different clusters may have the same number. Layout and names: ``nvmlGpuFabricInfo_v2_t`` of nvml.h, as in nvidia-ml-py.
"""

from __future__ import annotations

from dynamo_mpi.common.light_typing import Any, NamedTuple

NOT_SUPPORTED, NOT_STARTED, IN_PROGRESS, COMPLETED = range(4)
_STATES = {NOT_STARTED: "not started", IN_PROGRESS: "in progress", COMPLETED: "completed"}
# bits of the health mask: shift, width, what each value means; values that aren't listed are well, or not supported
_HEALTH = (
    (0, 0x3, {1: "degraded bandwidth"}),
    (2, 0x3, {1: "a route is being recovered"}),
    (4, 0x3, {1: "a route is unhealthy"}),
    (6, 0x3, {1: "recovering from an access timeout"}),
    (
        8,
        0xF,
        {
            2: "incorrect system GUID",
            3: "incorrect chassis serial number",
            4: "no partition",
            5: "too few NVLinks",
            6: "incompatible GPU firmware",
            7: "invalid location",
            8: "invalid GPU state",
        },
    ),
    (12, 0x3, {2: "no partition is assigned"}),
    (14, 0x3, {2: "disconnected from the fabric manager"}),
)


class GpuFabric(NamedTuple):
    """A GPU's place in an NVLink fabric.

    Args:
        state: ``NOT_STARTED``, ``IN_PROGRESS`` or ``COMPLETED``.
        status: NVML's code of the GPU's registration, once it is completed; 0 for success.
        cluster: UUID of its cluster in hexadecimal; empty if it is zero: NVLink doesn't leave the node.
        clique: number of its clique in the cluster.
        health: the health mask; 0 if the driver has none.
    """

    state: int
    status: int = 0
    cluster: str = ""
    clique: int = 0
    health: int = 0

    @property
    def problem(self) -> str:
        """Why the GPU is not part of the fabric yet; empty if it is."""
        if self.state != COMPLETED:
            return f"registration {_STATES.get(self.state, f'in state {self.state}')}"
        return f"registration failed with NVML's code {self.status}" if self.status else ""

    @property
    def faults(self) -> tuple[str, ...]:
        """What the health mask reports."""
        found = (said.get(self.health >> shift & width, "") for shift, width, said in _HEALTH)
        return tuple(text for text in found if text)

    @property
    def domain(self) -> str:
        """The GPUs that NVLink joins to it over nodes, by a short name; empty if NVLink doesn't leave its node."""
        return f"clique {self.clique} of cluster {self.cluster[:8]}" if self.cluster else ""

    def pack(self) -> str:
        """Write it as one word."""
        return f"{self.state}:{self.status}:{self.clique}:{self.health}:{self.cluster}"

    @classmethod
    def unpack(cls, text: str) -> GpuFabric:
        """Read what `pack` wrote.

        Raises:
            ValueError: ``text`` isn't such a word.
        """
        state, status, clique, health, cluster = text.split(":", 4)
        return cls(int(state), int(status), cluster, int(clique), int(health))


def read_fabric(nvml: Any, handle: Any) -> GpuFabric | None:
    """Read a GPU's place; None if it has none, or if driver or nvidia-ml-py don't report it. Never raises an `Exception`.

    Args:
        nvml: nvidia-ml-py, open.
        handle: NVML's handle of the GPU.
    """
    # drivers before 545 don't have the first, drivers before 525 neither
    info = _ask(nvml, handle, "c_nvmlGpuFabricInfo_v2_t", "nvmlDeviceGetGpuFabricInfoV")
    info = info or _ask(nvml, handle, "c_nvmlGpuFabricInfo_t", "nvmlDeviceGetGpuFabricInfo")
    if info is None or info.state == NOT_SUPPORTED:
        return None
    cluster = bytes(info.clusterUuid)
    return GpuFabric(
        int(info.state),
        int(info.status),
        cluster.hex() if any(cluster) else "",
        int(info.cliqueId),
        int(getattr(info, "healthMask", 0)),
    )


def _ask(nvml: Any, handle: Any, structure: str, call: str) -> Any:
    """Fill one of NVML's structures; None if it isn't available."""
    from ctypes import pointer  # nvidia-ml-py has imported it

    try:
        info = getattr(nvml, structure)()
        getattr(nvml, call)(handle, pointer(info))
    except Exception:
        return None
    return info
