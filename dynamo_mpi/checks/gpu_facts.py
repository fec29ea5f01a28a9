# SPDX-License-Identifier: Apache-2.0
"""Facts about the GPUs of a rank's node, read without starting CUDA: a CUDA context would hold memory in every rank.

NVML counts devices in PCI order and knows nothing of ``CUDA_VISIBLE_DEVICES``; CUDA counts the fastest first, unless ``CUDA_DEVICE_ORDER``
is ``PCI_BUS_ID``. The two agree if all GPUs are of one kind, as on most nodes. If they may not, a GPU is named ``#0``, ``#1``, as CUDA
counts: such names can only be counted, and compared between ranks of one node.

Inside a cgroup or a container NVML may show only some of the GPUs. The others are then ignored.
"""

from __future__ import annotations

import os

from dynamo_mpi.checks.gpu_fabric import GpuFabric, read_fabric
from dynamo_mpi.checks.gpu_place import GpuPlace, place_by_nvml, read_nodes
from dynamo_mpi.checks.nvml import is_hidden, open_nvml, optional, to_text
from dynamo_mpi.common.light_typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from dynamo_mpi.checks.gpu_place import NumaNode

_UUID_PREFIXES = ("GPU-", "MIG-")
_FIELDS_PER_GPU = 12
# of one GPU
_MOST_INSTANCES = 16
# NVML's own messages are short; by the name of the exception
_PROBLEMS = {
    "NVMLError_LibraryNotFound": "NVML (libnvidia-ml.so.1) isn't there: no NVIDIA driver, or a container that was started without GPUs",
    "NVMLError_DriverNotLoaded": "the NVIDIA driver isn't loaded",
    "NVMLError_NoPermission": "no permission to look at the GPUs",
    "NVMLError_LibRmVersionMismatch": "the NVIDIA driver was updated, and the old one is still loaded",
}


class GpuFacts(NamedTuple):
    """One GPU of the node.

    Args:
        number: NVML's index, in PCI order.
        uuid: its permanent name.
        name: the product's name.
        sm: compute capability, times ten.
        total_bytes: memory; 0 if NVML doesn't report it, as for GPUs that share the host's.
        free_bytes: memory that can be allocated now.
        used_bytes: memory that processes hold; the driver's own reserve is neither free nor used.
        holders: the processes that NVML shows, each with its bytes; in a container it may show none.
        mig: whether it is cut into instances.
        fabric: its place in an NVLink fabric; None if it has none, or if NVML doesn't report it.
        place: the CPUs and the memory node next to it; None if NVML doesn't report its PCI address.
        instances: the names of its instances, if it is cut into some.
    """

    number: int
    uuid: str
    name: str
    sm: int
    total_bytes: int = 0
    free_bytes: int = 0
    used_bytes: int = 0
    holders: tuple[tuple[int, int], ...] = ()
    mig: bool = False
    fabric: GpuFabric | None = None
    place: GpuPlace | None = None
    instances: tuple[str, ...] = ()


class NodeGpus(NamedTuple):
    """The GPUs of a rank's node, as the rank sees them.

    Args:
        gpus: all that NVML shows.
        visible: those that CUDA gives this rank, in CUDA's order: UUIDs, names of instances, or ``#0`` where only the number is known.
        driver: version of the driver.
        cuda: the newest CUDA that the driver supports, 12080 for 12.8; 0 if NVML doesn't report it.
        problem: why some or all facts could not be read; empty if all could.
    """

    gpus: tuple[GpuFacts, ...] = ()
    visible: tuple[str, ...] = ()
    driver: str = ""
    cuda: int = 0
    problem: str = ""

    @property
    def visible_gpus(self) -> tuple[GpuFacts, ...]:
        """The GPUs that `visible` names, if they are known for certain."""
        if len(self.visible) == len(self.gpus) and all(name.startswith("#") for name in self.visible):
            return self.gpus
        by_uuid = {gpu.uuid: gpu for gpu in self.gpus}
        return tuple(by_uuid[name] for name in self.visible if name in by_uuid)

    def taken_by(self, rank: int) -> str:
        """Return the name of the GPU that the engine assigns to ``rank``: ``rank % device_count()`` (``base_worker.py``)."""
        return self.visible[rank % len(self.visible)] if self.visible else ""

    def facts_of(self, name: str) -> GpuFacts | None:
        """Look up one of `visible`; None where only its number is known."""
        return next((gpu for gpu in self.gpus if gpu.uuid == name), None)

    def place_of(self, rank: int) -> GpuPlace | None:
        """Return the place of the GPU that the engine assigns to ``rank``, also of an instance's; None if it isn't known for certain."""
        name = self.taken_by(rank)
        if name.startswith("#"):
            # which one it is doesn't matter if all are next to the same CPUs
            found = {gpu.place and gpu.place._replace(address="") for gpu in self.gpus}
            return next(iter(found)) if len(found) == 1 else None
        return next((gpu.place for gpu in self.gpus if name and name in (gpu.uuid, *gpu.instances)), None)

    def pack(self) -> tuple[str, ...]:
        """Write it as a flat list of strings, for `dynamo_mpi.common.codec`."""
        head = (self.driver, str(self.cuda), self.problem, str(len(self.visible)), *self.visible)
        return (*head, *(text for gpu in self.gpus for text in _pack_gpu(gpu)))

    @classmethod
    def unpack(cls, values: Sequence[str]) -> NodeGpus:
        """Read what `pack` wrote.

        Raises:
            ValueError: ``values`` isn't such a list.
        """
        if len(values) < 4:
            raise ValueError(f"{len(values)} fields are too few for the GPUs of a node")
        driver, cuda, problem, count = values[:4]
        end = 4 + int(count)
        visible, rest = values[4:end], values[end:]
        if len(visible) != int(count) or len(rest) % _FIELDS_PER_GPU:
            raise ValueError(f"{len(values)} fields can't be {count} visible GPUs and whole GPUs")
        gpus = (_unpack_gpu(rest[at : at + _FIELDS_PER_GPU]) for at in range(0, len(rest), _FIELDS_PER_GPU))
        return cls(tuple(gpus), tuple(visible), driver, int(cuda), problem)


def read_gpus(environ: Mapping[str, str]) -> NodeGpus:
    """Read the facts of this node's GPUs. Never raises: what can't be read becomes `NodeGpus.problem`.

    Args:
        environ: this rank's environment.
    """
    try:
        with open_nvml() as nvml:
            gpus, problem = _read_all(nvml)
            driver = to_text(optional(nvml, "nvmlSystemGetDriverVersion") or "")
            cuda = int(optional(nvml, "nvmlSystemGetCudaDriverVersion") or 0)
            return NodeGpus(gpus, visible_gpus(gpus, environ), driver, cuda, problem)
    except ImportError:
        devices = device_files()
        seen = f"; /dev has {devices} NVIDIA GPUs" if devices else "; /dev has no NVIDIA GPU"
        return NodeGpus(problem=f"nvidia-ml-py isn't installed (pip install nvidia-ml-py){seen}")
    except Exception as error:
        return NodeGpus(problem=_describe(error))


def visible_gpus(gpus: Sequence[GpuFacts], environ: Mapping[str, str]) -> tuple[str, ...]:
    """Return which of a node's GPUs CUDA would give this process, as `NodeGpus.visible` names them.

    CUDA reads ``CUDA_VISIBLE_DEVICES`` like this: numbers, or UUIDs (a unique prefix is enough), or names of instances; the first invalid
    entry ends the list, and a duplicate empties it.
    """
    alike = len({(gpu.name, gpu.sm, gpu.total_bytes) for gpu in gpus}) < 2
    certain = alike or environ.get("CUDA_DEVICE_ORDER", "").strip().upper() == "PCI_BUS_ID"
    names = [gpu.uuid if certain else f"#{number}" for number, gpu in enumerate(gpus)]
    said = environ.get("CUDA_VISIBLE_DEVICES")
    if said is None:
        return tuple(names)
    by_uuid = said.strip().startswith(_UUID_PREFIXES)
    chosen: list[str] = []
    for entry in said.split(","):
        name = _by_uuid(entry.strip(), gpus) if by_uuid else _by_number(entry.strip(), names)
        if name is None:
            break
        if name in chosen:
            return ()
        chosen.append(name)
    return tuple(chosen)


def _by_number(entry: str, names: Sequence[str]) -> str | None:
    """Read a number as CUDA does: ``1gpu`` is 1."""
    digits = entry.removeprefix("+")
    length = next((at for at, char in enumerate(digits) if char not in "0123456789"), len(digits))
    if not 0 < length < 10 or int(digits[:length]) >= len(names):
        return None
    return names[int(digits[:length])]


def _by_uuid(entry: str, gpus: Sequence[GpuFacts]) -> str | None:
    if entry.startswith("MIG-"):
        return entry
    found = [gpu.uuid for gpu in gpus if entry.startswith("GPU-") and gpu.uuid.startswith(entry)]
    return found[0] if len(found) == 1 else None


def _read_all(nvml: Any) -> tuple[tuple[GpuFacts, ...], str]:
    """Return the GPUs, and the problems of those that can't be read."""
    gpus: list[GpuFacts] = []
    problems: list[str] = []
    hidden = 0
    nodes = read_nodes()
    for index in range(nvml.nvmlDeviceGetCount()):
        try:
            gpus.append(read_gpu(nvml, index, nodes))
        except Exception as error:
            if is_hidden(error):
                hidden += 1
            else:
                problems.append(f"GPU {index}: {_describe(error)}")
    if hidden and not gpus:
        from dynamo_mpi.layout.format import counted

        problems.append(
            f"no permission to use any of {counted(hidden, 'GPU')}: the job has none, or its cgroup hides them"
        )
    return tuple(gpus), "; ".join(problems)


def read_gpu(nvml: Any, index: int, nodes: Sequence[NumaNode] = ()) -> GpuFacts:
    """Read one GPU from NVML, which is open.

    Args:
        nvml: nvidia-ml-py.
        index: NVML's number of it.
        nodes: the machine's NUMA nodes, to know its place.

    Raises:
        Exception: NVML's own, of a class for each kind.
    """
    handle = nvml.nvmlDeviceGetHandleByIndex(index)
    major, minor = nvml.nvmlDeviceGetCudaComputeCapability(handle)
    # version 2 separates the driver's reserve, half a GiB and more, from the memory of processes; old drivers don't have it
    version = getattr(nvml, "nvmlMemory_v2", None)
    memory = optional(nvml, "nvmlDeviceGetMemoryInfo", handle, version) if version is not None else None
    memory = memory or optional(nvml, "nvmlDeviceGetMemoryInfo", handle)
    mig = optional(nvml, "nvmlDeviceGetMigMode", handle) or (0, 0)
    processes = optional(nvml, "nvmlDeviceGetComputeRunningProcesses", handle) or []
    return GpuFacts(
        index,
        to_text(nvml.nvmlDeviceGetUUID(handle)),
        to_text(nvml.nvmlDeviceGetName(handle)),
        10 * int(major) + int(minor),
        int(memory.total) if memory else 0,
        int(memory.free) if memory else 0,
        int(memory.used) if memory else 0,
        tuple((int(one.pid), int(one.usedGpuMemory or 0)) for one in processes if int(one.pid) != os.getpid()),
        bool(mig[0]),
        read_fabric(nvml, handle),
        place_by_nvml(nvml, handle, nodes) if nodes else None,
        _instances(nvml, handle) if mig[0] else (),
    )


def _instances(nvml: Any, handle: Any) -> tuple[str, ...]:
    found = (optional(nvml, "nvmlDeviceGetMigDeviceHandleByIndex", handle, index) for index in range(_MOST_INSTANCES))
    return tuple(to_text(optional(nvml, "nvmlDeviceGetUUID", one) or "") for one in found if one is not None)


def _describe(error: Exception) -> str:
    kind = type(error).__name__
    return _PROBLEMS.get(kind) or f"NVML: {' '.join(str(error).split()) or kind}"


def device_files(folder: str = "/dev") -> int:
    """Count the GPUs that the driver made device files for."""
    try:
        return sum(name.startswith("nvidia") and name[6:].isdecimal() for name in os.listdir(folder))
    except OSError:
        return 0


def _pack_gpu(gpu: GpuFacts) -> tuple[str, ...]:
    holders = " ".join(f"{pid}:{size}" for pid, size in gpu.holders)
    numbers = (gpu.sm, gpu.total_bytes, gpu.free_bytes, gpu.used_bytes)
    fabric = "" if gpu.fabric is None else gpu.fabric.pack()
    place = "" if gpu.place is None else gpu.place.pack()
    words = (holders, "mig" if gpu.mig else "", fabric, place, " ".join(gpu.instances))
    return (str(gpu.number), gpu.uuid, gpu.name, *map(str, numbers), *words)


def _unpack_gpu(values: Sequence[str]) -> GpuFacts:
    number, uuid, name, sm, total, free, used, holders, mig, fabric, place, instances = values
    pairs = [pair.partition(":") for pair in holders.split()]
    held = tuple((int(pid), int(size)) for pid, _, size in pairs)
    return GpuFacts(
        int(number),
        uuid,
        name,
        int(sm),
        int(total),
        int(free),
        int(used),
        held,
        mig == "mig",
        GpuFabric.unpack(fabric) if fabric else None,
        GpuPlace.unpack(place) if place else None,
        tuple(instances.split()),
    )
