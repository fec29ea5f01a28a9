# SPDX-License-Identifier: Apache-2.0
"""What a rank reports of its GPUs, over a stand-in for nvidia-ml-py that refuses what it doesn't know."""

from __future__ import annotations

import ctypes
import os
import sys
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dynamo_mpi.checks import gpu_facts
from dynamo_mpi.checks.gpu_fabric import COMPLETED, IN_PROGRESS, GpuFabric
from dynamo_mpi.checks.gpu_facts import GpuFacts, NodeGpus, read_gpus, visible_gpus
from dynamo_mpi.checks.gpu_place import GpuPlace
from dynamo_mpi.common.affinity import format_list
from dynamo_mpi.common.codec import decode_strings, encode_strings

GIB = 2**30
UUIDS = ("GPU-aa11", "GPU-aa22", "GPU-bb33")


FABRIC_FIELDS: tuple[tuple[str, Any], ...] = (
    ("clusterUuid", ctypes.c_uint8 * 16),
    ("status", ctypes.c_uint),
    ("cliqueId", ctypes.c_uint32),
    ("state", ctypes.c_uint),
)


class NVMLError(Exception):
    """As nvidia-ml-py has it: a class for each kind."""


class NVMLError_NoPermission(NVMLError):
    pass


class NVMLError_NotSupported(NVMLError):
    pass


class NVMLError_LibraryNotFound(NVMLError):
    pass


class NVMLError_DriverNotLoaded(NVMLError):
    pass


class NVMLError_GpuIsLost(NVMLError):
    pass


class FakeNvml:
    """The calls that are made, and no others. A fault is raised by the call of its name, for all GPUs or for one."""

    __spec__ = None
    nvmlMemory_v2 = 0x02000028

    def __init__(
        self,
        faults: dict[str, Exception] | None = None,
        count: int = 3,
        fabrics: dict[int, dict[str, Any]] | None = None,
    ) -> None:
        self.faults = faults or {}
        self.fabrics = fabrics or {}
        self.count = count
        self.open = 0

    def __getattr__(self, name: str) -> Any:
        raise AssertionError(f"pynvml.{name} isn't known here")

    def _fail(self, call: str, handle: int | None = None) -> None:
        for key in (call, f"{call}:{handle}"):
            if key in self.faults:
                raise self.faults[key]

    def nvmlInit(self) -> None:
        self._fail("nvmlInit")
        self.open += 1

    def nvmlShutdown(self) -> None:
        self.open -= 1

    def nvmlSystemGetDriverVersion(self) -> bytes:
        self._fail("nvmlSystemGetDriverVersion")
        return b"570.86.15"  # older releases give bytes

    def nvmlSystemGetCudaDriverVersion(self) -> int:
        return 12080

    def nvmlDeviceGetCount(self) -> int:
        self._fail("nvmlDeviceGetCount")
        return self.count

    def nvmlDeviceGetHandleByIndex(self, index: int) -> int:
        self._fail("nvmlDeviceGetHandleByIndex", index)
        return index

    def nvmlDeviceGetUUID(self, handle: int) -> str:
        return UUIDS[handle]

    def nvmlDeviceGetName(self, handle: int) -> str:
        return "NVIDIA H100 80GB HBM3"

    def nvmlDeviceGetCudaComputeCapability(self, handle: int) -> tuple[int, int]:
        return 9, 0

    def nvmlDeviceGetMemoryInfo(self, handle: int, version: int | None = None) -> SimpleNamespace:
        self._fail("nvmlDeviceGetMemoryInfo" + ("_v2" if version else ""), handle)
        return SimpleNamespace(total=80 * GIB, free=79 * GIB, used=0 if version else GIB)

    def nvmlDeviceGetMigMode(self, handle: int) -> list[int]:
        self._fail("nvmlDeviceGetMigMode", handle)
        return [1 if handle == 2 else 0, 0]

    def nvmlDeviceGetComputeRunningProcesses(self, handle: int) -> list[SimpleNamespace]:
        self._fail("nvmlDeviceGetComputeRunningProcesses", handle)
        own, other = os.getpid(), SimpleNamespace(pid=77, usedGpuMemory=3 * GIB)
        hidden = SimpleNamespace(pid=78, usedGpuMemory=None)
        return [SimpleNamespace(pid=own, usedGpuMemory=GIB), other, hidden] if handle == 1 else []

    class c_nvmlGpuFabricInfo_t(ctypes.Structure):
        """As nvml.h has it."""

        _fields_ = FABRIC_FIELDS

    class c_nvmlGpuFabricInfo_v2_t(ctypes.Structure):
        """As nvml.h has it; nvidia-ml-py sets the version."""

        _fields_ = (("version", ctypes.c_uint), *FABRIC_FIELDS, ("healthMask", ctypes.c_uint32))

        def __init__(self) -> None:
            super().__init__(version=0x02000024)

    def nvmlDeviceGetGpuFabricInfoV(self, handle: int, pointer: Any) -> int:
        self._fail("nvmlDeviceGetGpuFabricInfoV", handle)
        assert pointer.contents.version == ctypes.sizeof(pointer.contents) | 2 << 24
        pointer.contents.healthMask = self.fabrics.get(handle, {}).get("healthMask", 0)
        return self.nvmlDeviceGetGpuFabricInfo(handle, pointer)

    def nvmlDeviceGetGpuFabricInfo(self, handle: int, pointer: Any) -> int:
        self._fail("nvmlDeviceGetGpuFabricInfo", handle)
        for name, value in self.fabrics.get(handle, {}).items():
            if name == "clusterUuid":
                pointer.contents.clusterUuid[:] = value
            elif name != "healthMask":
                setattr(pointer.contents, name, value)
        return 0


def read(
    monkeypatch: pytest.MonkeyPatch,
    faults: dict[str, Exception] | None = None,
    environ: dict[str, str] | None = None,
    count: int = 3,
    fabrics: dict[int, dict[str, Any]] | None = None,
) -> NodeGpus:
    fake = FakeNvml(faults, count, fabrics)
    monkeypatch.setitem(sys.modules, "pynvml", fake)
    facts = read_gpus(environ or {})
    assert fake.open == 0, "NVML was left open"
    return facts


def test_everything_that_is_there_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    facts = read(monkeypatch)
    assert facts.problem == ""
    assert (facts.driver, facts.cuda) == ("570.86.15", 12080)
    assert facts.visible == UUIDS
    assert facts.gpus[0] == GpuFacts(0, "GPU-aa11", "NVIDIA H100 80GB HBM3", 90, 80 * GIB, 79 * GIB, 0)
    assert facts.gpus[1].holders == ((77, 3 * GIB), (78, 0))  # this process is no stranger
    assert [gpu.mig for gpu in facts.gpus] == [False, False, True]


def test_no_gpu_is_no_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    facts = read(monkeypatch, count=0)
    assert (facts.gpus, facts.visible, facts.problem, facts.driver) == ((), (), "", "570.86.15")


@pytest.mark.parametrize(
    ("call", "fault", "words"),
    [
        ("nvmlInit", NVMLError_LibraryNotFound("NVML Shared Library Not Found"), "libnvidia-ml.so.1"),
        ("nvmlInit", NVMLError_DriverNotLoaded("Driver Not Loaded"), "driver isn't loaded"),
        ("nvmlInit", NVMLError_NoPermission("Insufficient Permissions"), "no permission"),
        ("nvmlInit", NVMLError("Unknown\nError"), "NVML: Unknown Error"),
        ("nvmlInit", OSError(), "NVML: OSError"),
        ("nvmlDeviceGetCount", NVMLError("odd"), "NVML: odd"),
        ("nvmlDeviceGetHandleByIndex", NVMLError_NoPermission(), "any of 3 GPUs"),
    ],
)
def test_why_nothing_can_be_read_is_reported(
    monkeypatch: pytest.MonkeyPatch, call: str, fault: Exception, words: str
) -> None:
    facts = read(monkeypatch, {call: fault})
    assert (facts.gpus, facts.visible) == ((), ())
    assert words in facts.problem


@pytest.mark.parametrize("devices", [0, 2])
def test_a_missing_package_is_named_with_its_cure(monkeypatch: pytest.MonkeyPatch, devices: int) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)
    monkeypatch.setattr(gpu_facts, "device_files", lambda: devices)
    problem = read_gpus({}).problem
    assert "pip install nvidia-ml-py" in problem
    assert ("no NVIDIA GPU" if not devices else "2 NVIDIA GPUs") in problem


def test_gpus_that_a_cgroup_hides_are_not_there_and_not_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    faults: dict[str, Exception] = {"nvmlDeviceGetHandleByIndex:0": NVMLError_NoPermission()}
    facts = read(monkeypatch, faults, {"CUDA_VISIBLE_DEVICES": "0,1"})
    assert facts.problem == ""
    assert facts.visible == UUIDS[1:]  # CUDA counts what is left


def test_a_gpu_that_is_lost_is_reported_and_the_others_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    facts = read(monkeypatch, {"nvmlDeviceGetHandleByIndex:1": NVMLError_GpuIsLost("GPU is lost")})
    assert [gpu.number for gpu in facts.gpus] == [0, 2]
    assert facts.problem == "GPU 1: NVML: GPU is lost"


CLUSTER = bytes(range(16))
HEALTHY = 0b01_01_0001_10_10_10_10
# a GPU of a rack with NVLink over nodes, one of a node with NVSwitches, and one that has not joined
FABRICS: dict[int, dict[str, Any]] = {
    0: {"state": COMPLETED, "clusterUuid": CLUSTER, "cliqueId": 7, "healthMask": HEALTHY},
    1: {"state": COMPLETED},
    2: {"state": IN_PROGRESS, "status": 15},
}


def test_the_place_in_the_nvlink_fabric_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    places = [gpu.fabric for gpu in read(monkeypatch, fabrics=FABRICS).gpus]
    assert places[:2] == [GpuFabric(3, 0, CLUSTER.hex(), 7, HEALTHY), GpuFabric(3)]
    assert places[0] is not None and places[1] is not None and places[2] is not None
    assert (places[0].domain, places[1].domain) == ("clique 7 of cluster 00010203", "")
    assert [place and (place.problem, place.faults) for place in places] == [
        ("", ()),
        ("", ()),
        ("registration in progress", ()),
    ]
    failed = GpuFabric(3, status=999)
    assert failed.problem == "registration failed with NVML's code 999"


def test_a_gpu_without_a_fabric_has_no_place(monkeypatch: pytest.MonkeyPatch) -> None:
    """As an H200 without NVSwitches answers: success, and state 0."""
    assert [gpu.fabric for gpu in read(monkeypatch).gpus] == [None] * 3


def test_an_old_driver_has_the_first_kind_of_fabric_info(monkeypatch: pytest.MonkeyPatch) -> None:
    old: dict[str, Exception] = {"nvmlDeviceGetGpuFabricInfoV": NVMLError_NotSupported()}
    assert read(monkeypatch, old, fabrics=FABRICS).gpus[0].fabric == GpuFabric(3, 0, CLUSTER.hex(), 7)
    older = {**old, "nvmlDeviceGetGpuFabricInfo": NVMLError_NotSupported()}
    assert read(monkeypatch, older, fabrics=FABRICS).gpus[0].fabric is None


@pytest.mark.parametrize(
    ("mask", "faults"),
    [
        (0, ()),
        (0xAA, ()),
        (HEALTHY, ()),
        (0b01, ("degraded bandwidth",)),
        (0b0100, ("a route is being recovered",)),
        (0b01_0000, ("a route is unhealthy",)),
        (0b01_00_0000, ("recovering from an access timeout",)),
        (2 << 8, ("incorrect system GUID",)),
        (5 << 8, ("too few NVLinks",)),
        (0b10 << 12, ("no partition is assigned",)),
        (0b10 << 14, ("disconnected from the fabric manager",)),
        (0b01_1001, ("degraded bandwidth", "a route is unhealthy")),
    ],
)
def test_the_health_mask_is_read(mask: int, faults: tuple[str, ...]) -> None:
    assert GpuFabric(3, health=mask).faults == faults


def test_what_a_gpu_does_not_support_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    names = ("MemoryInfo", "MemoryInfo_v2", "MigMode", "ComputeRunningProcesses")
    facts = read(monkeypatch, {f"nvmlDeviceGet{name}": NVMLError_NotSupported() for name in names})
    assert facts.problem == ""
    assert facts.gpus[2] == GpuFacts(2, "GPU-bb33", "NVIDIA H100 80GB HBM3", 90)


def test_an_old_driver_has_the_first_kind_of_memory_info(monkeypatch: pytest.MonkeyPatch) -> None:
    facts = read(monkeypatch, {"nvmlDeviceGetMemoryInfo_v2": NVMLError_NotSupported()})
    assert facts.gpus[0].used_bytes == GIB
    assert read(monkeypatch, {"nvmlSystemGetDriverVersion": NVMLError("odd")}).driver == ""


def gpus_of(*uuids: str, kinds: str = "") -> tuple[GpuFacts, ...]:
    return tuple(GpuFacts(i, uuid, (kinds or "a" * len(uuids))[i], 90) for i, uuid in enumerate(uuids))


@pytest.mark.parametrize(
    ("said", "seen"),
    [
        (None, "012"),
        ("", ""),
        ("0", "0"),
        ("2,0", "20"),
        (" 1 , 2 ", "12"),
        ("+1", "1"),
        ("1gpu,2", "12"),  # read as strtol does
        # the first that is none ends the list
        ("0,-1,1", "0"),
        ("-1", ""),
        ("0,3,1", "0"),
        ("0,,1", "0"),
        ("NoDevFiles", ""),
        ("0,GPU-aa22", "0"),
        ("99999999999999999999", ""),
        ("\u0661", ""),
        # one that comes twice empties it
        ("0,0", ""),
        ("1,2,1", ""),
        ("GPU-aa22", "1"),
        ("GPU-bb", "2"),
        ("GPU-bb33,GPU-aa11", "20"),
        ("GPU-aa", ""),  # two begin so
        ("GPU-bb33,1", "2"),
        ("GPU-none", ""),
        ("GPU-bb,GPU-bb33", ""),
    ],
)
def test_cuda_visible_devices_is_read_as_cuda_does(said: str | None, seen: str) -> None:
    environ = {} if said is None else {"CUDA_VISIBLE_DEVICES": said}
    assert visible_gpus(gpus_of(*UUIDS), environ) == tuple(UUIDS[int(number)] for number in seen)


def test_instances_keep_their_names() -> None:
    environ = {"CUDA_VISIBLE_DEVICES": "MIG-1,MIG-2"}
    assert visible_gpus(gpus_of(*UUIDS), environ) == ("MIG-1", "MIG-2")


@pytest.mark.parametrize(
    ("environ", "names"),
    [
        ({}, ("#0", "#1", "#2")),
        ({"CUDA_VISIBLE_DEVICES": "1"}, ("#1",)),
        ({"CUDA_VISIBLE_DEVICES": "GPU-aa22"}, ("GPU-aa22",)),
        ({"CUDA_DEVICE_ORDER": "FASTEST_FIRST"}, ("#0", "#1", "#2")),
        ({"CUDA_DEVICE_ORDER": "PCI_BUS_ID", "CUDA_VISIBLE_DEVICES": "1"}, ("GPU-aa22",)),
    ],
)
def test_numbers_name_a_gpu_only_where_the_order_is_certain(environ: dict[str, str], names: tuple[str, ...]) -> None:
    assert visible_gpus(gpus_of(*UUIDS, kinds="aab"), environ) == names


def test_the_gpus_behind_the_names() -> None:
    gpus = gpus_of(*UUIDS, kinds="aab")
    assert NodeGpus(gpus, ("#0", "#1", "#2")).visible_gpus == gpus  # all of them, in whatever order
    assert NodeGpus(gpus, ("#0",)).visible_gpus == ()
    assert NodeGpus(gpus, ("GPU-bb33", "GPU-aa11")).visible_gpus == (gpus[2], gpus[0])
    assert NodeGpus(gpus, ("GPU-bb33", "GPU-aa11")).taken_by(5) == "GPU-aa11"
    assert NodeGpus(gpus).taken_by(5) == ""


SIZE = st.integers(0, 2**50)
NAME = st.text(max_size=20)
LIST = st.frozensets(st.integers(0, 300), max_size=6).map(format_list)
GPU = st.builds(
    GpuFacts,
    st.integers(0, 64),
    NAME,
    NAME,
    st.integers(0, 200),
    SIZE,
    SIZE,
    SIZE,
    st.lists(st.tuples(SIZE, SIZE), max_size=3).map(tuple),
    st.booleans(),
    st.none() | st.builds(GpuFabric, st.integers(0, 3)),
    st.none() | st.builds(GpuPlace, st.just("0000:3b:00.0"), st.integers(-1, 9), LIST, LIST),
    st.lists(st.sampled_from(["MIG-a", "MIG-b"]), max_size=2).map(tuple),
)
NODE = st.builds(
    NodeGpus, st.lists(GPU, max_size=4).map(tuple), st.lists(NAME, max_size=4).map(tuple), NAME, st.integers(0), NAME
)


@given(NODE)
def test_what_a_rank_saw_arrives_as_it_was(node: NodeGpus) -> None:
    assert NodeGpus.unpack(decode_strings(encode_strings(node.pack()))) == node


@given(st.lists(st.text(alphabet="0123:- x", max_size=4), max_size=30))
def test_what_is_no_such_list_is_refused(values: list[str]) -> None:
    try:
        NodeGpus.unpack(values)
    except ValueError:
        return


@given(st.text(), st.integers(0, 4), st.sampled_from(["", "PCI_BUS_ID"]))
def test_whatever_the_variable_says_no_gpu_is_made_up(said: str, count: int, order: str) -> None:
    gpus = gpus_of(*(f"GPU-{i}" for i in range(count)))
    visible = visible_gpus(gpus, {"CUDA_VISIBLE_DEVICES": said, "CUDA_DEVICE_ORDER": order})
    assert len(set(visible)) == len(visible)
    assert all(name in {gpu.uuid for gpu in gpus} or name.startswith("MIG-") for name in visible)
