# SPDX-License-Identifier: Apache-2.0
"""What doctor judges of packages, MPI, GPUs, the network, ports, the host and the environment."""

from __future__ import annotations

import json
import re
import resource
from pathlib import Path

import pytest

from dynamo_mpi.checks.gpu_facts import GpuFacts, NodeGpus
from dynamo_mpi.checks.gpu_place import GpuPlace
from dynamo_mpi.checks.host_facts import HostFacts
from dynamo_mpi.checks.rank_facts import RankFacts
from dynamo_mpi.common.cgroup import CgroupLimits, cpu_share, own_groups, read_limits
from dynamo_mpi.common.networks import HostNetworks, Interface
from dynamo_mpi.mpi.launcher import Launcher, LaunchInfo, MpiLibrary
from dynamo_mpi.ops.doctor import binding, environment, fabric, gpus, host, mpi, packages, ports
from dynamo_mpi.ops.doctor.check import Check, Context, Status
from dynamo_mpi.ops.doctor.commands import Output
from dynamo_mpi.ops.doctor.fabric import (
    RdmaPort,
    missing_for_nccl,
    missing_for_open_mpi,
    missing_for_ucx,
    read_rdma_ports,
)
from dynamo_mpi.ops.doctor.host import Segment, own_segments, unused
from dynamo_mpi.ops.doctor.mpi import loaded_libraries
from dynamo_mpi.supervisor.leftovers import mapped_path, paths_in_use
from tests.conftest import ROOT

GIB = 2**30
OPEN_MPI, MPICH = MpiLibrary("openmpi", "Open MPI v5.0.11"), MpiLibrary("mpich", "MPICH Version: 5.0.2")
IN_RANK = LaunchInfo(Launcher.SLURM_PMIX, size=2)


def by_id(checks: object) -> dict[str, Check]:
    assert isinstance(checks, (list, tuple))
    return {check.id: check for check in checks}


# -- packages ---------------------------------------------------------------------------------------------------------


def test_the_oldest_versions_are_those_of_the_package() -> None:
    required = dict(re.findall(r'"([a-z0-9-]+)(?:\[\w+\])?>=([\d.]+)', (ROOT / "pyproject.toml").read_text()))
    for package in packages.PACKAGES:
        assert required[package.name.replace("_", "-")] == package.oldest, package.name


def test_missing_packages_are_no_error_where_no_ranks_run() -> None:
    mpi4py, numpy = packages.PACKAGES[0], packages.PACKAGES[-1]
    assert packages.judge(mpi4py, None, in_rank=False).status is Status.SKIPPED
    assert packages.judge(mpi4py, None, in_rank=True).code == 64
    assert packages.judge(numpy, None, in_rank=True).status is Status.SKIPPED
    assert packages.judge(mpi4py, "3.0.9", in_rank=True).status is Status.ERROR
    assert packages.judge(mpi4py, "3.0.9", in_rank=False).status is Status.WARNING
    assert packages.judge(mpi4py, "4.1.0rc1", in_rank=True).status is Status.OK
    assert packages.judge(mpi4py, "of unknown version", in_rank=True).status is Status.OK


def test_dynamo_and_its_runtime_are_of_one_release() -> None:
    assert [check.status for check in packages.judge_dynamo("1.6.1", "1.4.2")] == [Status.WARNING]
    assert not list(packages.judge_dynamo("1.4.1", "1.4.2"))
    assert not list(packages.judge_dynamo(None, "1.4.2"))


# -- MPI --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("launch", "library", "status", "word"),
    [
        (LaunchInfo(Launcher.ALONE), OPEN_MPI, Status.OK, "no launcher"),
        (LaunchInfo(Launcher.SLURM_SHELL, size=8, job_id="7"), OPEN_MPI, Status.OK, "ranks need srun"),
        (LaunchInfo(Launcher.SLURM_PMIX, 1, 2), OPEN_MPI, Status.OK, "rank 1 of 2, by srun --mpi=pmix"),
        (LaunchInfo(Launcher.SLURM_PMIX, 1, 2), MPICH, Status.ERROR, "mpi4py uses MPICH"),
        (LaunchInfo(Launcher.SRUN_WITHOUT_MPI, 0, 2), OPEN_MPI, Status.ERROR, "without an MPI plugin"),
        (LaunchInfo(Launcher.OPEN_MPI, 0, 2), None, Status.OK, "Open MPI's mpirun"),
    ],
)
def test_the_launch(launch: LaunchInfo, library: MpiLibrary | None, status: Status, word: str) -> None:
    check = mpi.judge_launch(launch, library)
    assert check.status is status
    assert word in check.found
    assert check.code == (64 if status is Status.ERROR else 0)


OPEN_MPI_4 = MpiLibrary("openmpi", "Open MPI v4.1.4")


@pytest.mark.parametrize(
    ("library", "environ", "ignored", "meant"),
    [
        (OPEN_MPI, "OMPI_MCA_orte_default_hostfile", "OMPI_MCA_orte_default_hostfile", "PRTE_MCA_prte_default_hostfile=…"),
        (OPEN_MPI, "OMPI_MCA_plm_rsh_agent", "OMPI_MCA_plm_rsh_agent", "PRTE_MCA_plm_ssh_agent=…"),
        (OPEN_MPI, "OMPI_MCA_plm_base_verbose", "OMPI_MCA_plm_base_verbose", "PRTE_MCA_plm_base_verbose=…"),
        (OPEN_MPI, "OMPI_MCA_odls_base_verbose", "OMPI_MCA_odls_base_verbose", "PRTE_MCA_odls_base_verbose=…"),
        (OPEN_MPI, "OMPI_MCA_ras_base_verbose", "OMPI_MCA_ras_base_verbose", "PRTE_MCA_ras_base_verbose=…"),
        (OPEN_MPI, "OMPI_MCA_prte_tmpdir_base", "OMPI_MCA_prte_tmpdir_base", "PRTE_MCA_prte_tmpdir_base=…"),
        (
            OPEN_MPI,
            "OMPI_MCA_rmaps_base_oversubscribe OMPI_MCA_rmaps_base_mapping_policy",
            "OMPI_MCA_rmaps_base_mapping_policy",
            "PRTE_MCA_rmaps_default_mapping_policy=…",
        ),
        (
            OPEN_MPI,
            "OMPI_MCA_hwloc_base_binding_policy",
            "OMPI_MCA_hwloc_base_binding_policy",
            "PRTE_MCA_hwloc_default_binding_policy=…",
        ),
        (OPEN_MPI_4, "PRTE_MCA_prte_default_hostfile", "PRTE_MCA_prte_default_hostfile", "OMPI_MCA_orte_default_hostfile=…"),
    ],
)  # fmt: skip
def test_parameters_of_another_open_mpi(library: MpiLibrary, environ: str, ignored: str, meant: str) -> None:
    (check,) = mpi.judge_parameters(dict.fromkeys(environ.split(), "1"), library)
    assert check.status is Status.WARNING
    assert f"Open MPI {library.version[10]} ignores " in check.found and ignored in check.found
    assert check.fix == f"export {meant}"


@pytest.mark.parametrize(
    ("library", "environ"),
    [
        (OPEN_MPI, "PRTE_MCA_prte_default_hostfile OMPI_MCA_btl OMPI_MCA_hwloc_base_verbose OMPI_MCA_coll_tuned_priority"),
        (OPEN_MPI, "OMPI_MCA_orte_default_hostfile PRTE_MCA_prte_default_hostfile"),
        (OPEN_MPI, "OMPI_MCA_rmaps_base_oversubscribe PRTE_MCA_rmaps_default_mapping_policy"),
        (OPEN_MPI_4, "OMPI_MCA_orte_default_hostfile PRTE_MCA_prte_default_hostfile"),
        (OPEN_MPI_4, "OMPI_MCA_plm_rsh_agent"),
        (MPICH, "OMPI_MCA_orte_default_hostfile"),
    ],
)  # fmt: skip
def test_parameters_that_count_are_not_mentioned(library: MpiLibrary, environ: str) -> None:
    assert list(mpi.judge_parameters(dict.fromkeys(environ.split(), "1"), library)) == []


FAKES = {
    "crash": ("import os, signal\nos.kill(os.getpid(), signal.SIGSEGV)\n", Status.ERROR, "SIGSEGV"),
    "exit": ("import os\nprint('no licence', flush=True)\nos._exit(3)\n", Status.ERROR, "exit code 3: no licence"),
    "hang": ("import time\ntime.sleep(300)\n", Status.WARNING, "did not end within"),
    "missing": ("raise RuntimeError('cannot load MPI library')\n", Status.WARNING, "cannot load MPI library"),
}


@pytest.mark.parametrize("name", FAKES)
def test_a_library_that_can_not_be_loaded_is_a_finding(name: str, tmp_path: Path) -> None:
    text, status, word = FAKES[name]
    (tmp_path / "mpi4py").mkdir()
    (tmp_path / "mpi4py" / "__init__.py").write_text("class rc: pass\n")
    (tmp_path / "mpi4py" / "MPI.py").write_text(text)
    context = Context.of({"PYTHONPATH": str(tmp_path), "PATH": "/usr/bin:/bin"}, 1.5 if name == "hang" else 30)
    found = by_id(tuple(mpi.check_mpi(context)))
    assert found["library"].status is status
    assert word in found["library"].found
    assert found["launch"].status is Status.OK


def test_the_real_library_is_named_and_mpi_not_started() -> None:
    found = by_id(tuple(mpi.check_mpi(Context.of({"PATH": "/usr/bin:/bin"}, 60))))
    assert re.match(r"Open MPI v\d\S* by mpi4py \d.*\(/.*libmpi\.so", found["library"].found)
    assert found["interface"].found.startswith("PMIx")


def test_libraries_are_found_among_what_is_mapped() -> None:
    line = "7f00-7f01 r-xp 00000000 fe:01 42                 "
    maps = f"{line}/opt/ompi/lib/libmpi.so.40.40.11\n{line}/opt/ompi/lib/libpmix.so.2\n{line}/x/libmpi_cxx.so\n"
    assert loaded_libraries(maps) == {"mpi": "/opt/ompi/lib/libmpi.so.40.40.11", "pmix": "/opt/ompi/lib/libpmix.so.2"}


# -- GPUs -------------------------------------------------------------------------------------------------------------


def look(tmp_path: Path, *changes: dict[str, object], **variables: str) -> dict[str, Check]:
    """Have GPUs of a stand-in looked at; each of ``changes`` is one of them."""
    usual = {"name": "NVIDIA H100 80GB HBM3", "sm": [9, 0], "total": 80 * GIB, "free": 79 * GIB, "used": 0, "mig": 0}
    listed = [{**usual, "uuid": f"GPU-{at}", "processes": [], **change} for at, change in enumerate(changes)]
    (tmp_path / "gpus.json").write_text(json.dumps({"driver": "570.86.15", "cuda": 12080, "gpus": listed}))
    environ = {
        "PYTHONPATH": str(ROOT / "tests" / "standins"),
        "PYNVML_STANDIN": str(tmp_path / "gpus.json"),
        "PATH": "/usr/bin:/bin",
        **variables,
    }
    return by_id(tuple(gpus.check_gpus(Context.of(environ, 30))))


def test_gpus_that_are_well(tmp_path: Path) -> None:
    found = look(tmp_path, {"nvlinks": [1] * 18}, {"nvlinks": [1] * 18})
    assert {check.status for check in found.values()} == {Status.OK}
    assert found["gpus"].found == "2 GPUs (NVIDIA H100 80GB HBM3, 80.0 GiB)"
    assert found["driver"].found == "570.86.15 (CUDA 12.8)"
    assert found["nvlink"].found == "36 links up"


def test_cpus_next_to_the_gpus(tmp_path: Path) -> None:
    assert look(tmp_path, {}, {})["binding"].found.startswith("GPUs 0-1 next to CPUs 0")
    places = [GpuPlace(f"0000:{number}:00.0", number // 2, ("0-3", "4-7")[number // 2]) for number in range(4)]
    node = NodeGpus(
        tuple(GpuFacts(number, f"GPU-{number}", "NVIDIA", 90, place=place) for number, place in enumerate(places)),
        tuple(f"GPU-{number}" for number in range(4)),
    )
    row = RankFacts(3, "n1", HostFacts(False, "", (0, 1), allowed=tuple(range(8))), node)
    known = binding.judge(row, in_rank=False)
    assert known.found == "GPUs 0-1 next to CPUs 0-3 (node 0); GPUs 2-3 next to CPUs 4-7 (node 1)"
    wrong = binding.judge(row, in_rank=True)
    assert wrong.status is Status.WARNING
    assert "rank 3 on n1: GPU 3 (0000:3:00.0) is next to CPUs 4-7 (node 1), bound to CPUs 0-1" in wrong.found
    unbound = row._replace(facts=row.facts._replace(cpus=tuple(range(8))))
    assert binding.judge(unbound, in_rank=True).status is Status.OK
    unknown = node._replace(gpus=tuple(gpu._replace(place=None) for gpu in node.gpus))
    assert binding.judge(row._replace(gpus=unknown), in_rank=True).status is Status.SKIPPED


def test_gpus_that_are_not(tmp_path: Path) -> None:
    busy = {"free": 9 * GIB, "used": 70 * GIB, "processes": [[42, 70 * GIB]]}
    found = look(
        tmp_path,
        {**busy, "nvlinks": [1, 0]},
        {"mig": 1, "uncorrected": 3, "remapped": [0, 1, 1, 0]},
        {"name": "NVIDIA B200", "sm": [10, 0]},
        CUDA_VISIBLE_DEVICES="0,1,2",
    )
    assert "pid 42 holds 70.0 GiB" in found["memory"].found
    assert found["nvlink"].found == "GPU 0: 1 of 2 up"
    assert found["ecc"].found == "GPU 1: 3 uncorrected memory errors, a row is remapped at the next reset"
    assert (found["alike"].status, found["alike"].code) == (Status.ERROR, 64)
    assert found["mig"].status is Status.ERROR
    hidden = look(tmp_path, {}, {}, CUDA_VISIBLE_DEVICES="1")
    assert hidden["visible"].found == "CUDA_VISIBLE_DEVICES leaves 1 of 2 GPUs"


def test_the_nvlink_fabric_of_the_gpus(tmp_path: Path) -> None:
    rack: dict[str, object] = {"fabric": {"state": 3, "cluster": "0a" * 16, "clique": 5, "health": 0xAA}}
    assert "fabric" not in look(tmp_path, {}, {})
    well = look(tmp_path, rack, rack)["fabric"]
    assert (well.status, well.found) == (Status.OK, "2 GPUs registered and healthy: clique 5 of cluster 0a0a0a0a")
    assert (
        look(tmp_path, {"fabric": {"state": 3}})["fabric"].found
        == "1 GPU registered and healthy: NVLink stays in the node"
    )
    late = look(tmp_path, rack, {"fabric": {"state": 2}})["fabric"]
    assert (late.status, "GPU 1 on" in late.found, "registration in progress" in late.found) == (
        Status.WARNING,
        True,
        True,
    )
    sick = look(tmp_path, rack, {"fabric": {"state": 3, "cluster": "0a" * 16, "clique": 5, "health": 1}})["fabric"]
    assert "degraded bandwidth" in sick.found


def test_no_gpu_is_no_error(tmp_path: Path) -> None:
    assert look(tmp_path)["nvml"].status is Status.SKIPPED
    driver = by_id(
        tuple(gpus.judge(gpus.GpuLook(NodeGpus(problem="the NVIDIA driver isn't loaded")), "n1", in_rank=True))
    )
    assert driver["nvml"].status is Status.SKIPPED
    broken = gpus.GpuLook(NodeGpus(problem="the NVIDIA driver was updated"), devices=8)
    assert gpus.judge_problem(broken, in_rank=True).status is Status.ERROR
    assert gpus.judge_problem(broken, in_rank=False).status is Status.WARNING


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"facts": [], "devices": 0, "health": []}', "x"])
def test_an_answer_that_is_none_is_reported(text: str) -> None:
    assert isinstance(gpus.read_look(Output(0, text, "", 1.0)), str)


# -- network ----------------------------------------------------------------------------------------------------------


def make_port(folder: Path, device: str, state: str, layer: str = "InfiniBand") -> None:
    place = folder / device / "ports" / "1"
    place.mkdir(parents=True)
    (place / "state").write_text(f"{state}\n")
    (place / "rate").write_text("400 Gb/sec (4X NDR)\n")
    (place / "link_layer").write_text(f"{layer}\n")


def test_rdma_devices(tmp_path: Path) -> None:
    assert read_rdma_ports(tmp_path / "none") == ()
    make_port(tmp_path, "mlx5_0", "4: ACTIVE")
    make_port(tmp_path, "mlx5_1", "1: DOWN", "Ethernet")
    found = read_rdma_ports(tmp_path)
    assert found[0] == RdmaPort("mlx5_0", 1, "ACTIVE", "400 Gb/sec (4X NDR)", "InfiniBand")
    assert [check.status for check in fabric.judge_rdma(found, {}, usable=True)] == [Status.OK]
    named = list(fabric.judge_rdma(found, {"NCCL_IB_HCA": "=mlx5_0,mlx5_1:1"}, usable=False))
    assert [check.status for check in named] == [Status.WARNING] * 2
    assert "mlx5_1:1, which" in named[0].expected
    assert [check.status for check in fabric.judge_rdma(found[1:], {}, usable=True)] == [Status.WARNING]
    assert [check.status for check in fabric.judge_rdma((), {}, usable=False)] == [Status.SKIPPED]


@pytest.mark.parametrize(
    ("value", "missing"),
    [
        ("eth", []),
        ("=eth", ["eth"]),
        ("=eth0,ib0", ["ib0"]),
        ("^lo,docker", []),
        ("ib", ["ib"]),
        ("eth0,lo", []),
        ("", []),
    ],
)
def test_names_as_nccl_reads_them(value: str, missing: list[str]) -> None:
    assert missing_for_nccl(value, ("lo", "eth0")) == missing


def test_names_as_ucx_and_open_mpi_read_them() -> None:
    devices = (RdmaPort("mlx5_0", 1, "ACTIVE", "", ""),)
    assert missing_for_ucx("mlx5_0:1,eth0,all", ("eth0",), devices) == []
    assert missing_for_ucx("mlx5_0,mlx5_9:1", ("eth0",), devices) == ["mlx5_0", "mlx5_9:1"]
    assert missing_for_open_mpi("10.0.0.0/8,eth0,ib0", ("eth0",)) == ["ib0"]


def test_a_named_device_that_is_not_here_is_an_error_in_a_rank_alone() -> None:
    environ = {"NCCL_SOCKET_IFNAME": "ib0", "UCX_NET_DEVICES": "eth0"}
    for in_rank, status in ((True, Status.ERROR), (False, Status.WARNING)):
        found = by_id(tuple(fabric.judge_named(environ, ("lo", "eth0"), (), in_rank=in_rank)))
        assert found["NCCL_SOCKET_IFNAME"].status is status
        assert found["UCX_NET_DEVICES"].status is Status.OK
    assert fabric.judge_address("127.0.0.1").status is Status.WARNING
    assert fabric.judge_address("fd00::2").status is Status.OK


def test_of_several_interfaces_the_one_that_a_worker_takes_is_advised_for_nccl_and_ucx() -> None:
    links = (Interface("eth0", ("10.1.0.1/24",), 1000), Interface("ib0", ("10.9.0.1/16",), 200_000))
    own = HostNetworks("n1", "", links)
    (check,) = fabric.judge_networks(own, {}, rdma=False)
    assert check.status is Status.OK
    assert check.found == (
        "of eth0, ib0 a worker takes ib0, 200 Gb/s, where all its hosts share that network; "
        "the same for NCCL and UCX: NCCL_SOCKET_IFNAME==ib0 UCX_NET_DEVICES=ib0"
    )
    (check,) = fabric.judge_networks(own, {"NCCL_SOCKET_IFNAME": "ib"}, rdma=True)
    assert "NCCL" not in check.found
    assert not list(fabric.judge_networks(own._replace(interfaces=links[:1]), {}, rdma=False))


def test_our_own_networks_are_looked_up() -> None:
    context = Context({"DYN_MPI_LIVENESS_NETWORK": "nope0", "DYN_MPI_KV_NETWORK": "127.0.0.0/8"}, launch=IN_RANK)
    found = by_id(tuple(fabric.check_named(context)))
    assert (found["DYN_MPI_LIVENESS_NETWORK"].status, found["DYN_MPI_LIVENESS_NETWORK"].code) == (Status.ERROR, 64)
    assert found["DYN_MPI_KV_NETWORK"].found == "127.0.0.0/8 is 127.0.0.1 here"


# -- ports ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "taken", "status"),
    [
        ("", None, Status.SKIPPED),
        ("-1", None, Status.SKIPPED),
        ("0", None, Status.OK),
        ("8081", None, Status.OK),
        ("8081", "process 1", Status.WARNING),
        ("65535", None, Status.OK),
        ("65536", None, Status.ERROR),
        ("http", None, Status.ERROR),
    ],
)
def test_the_system_port(text: str, taken: str | None, status: Status) -> None:
    assert ports.judge_system_port(text, taken).status is status


def test_ports_of_services() -> None:
    assert ports.judge_port(ports.Wanted("http-port", 8000, "", None)).status is Status.OK
    assert ports.judge_port(ports.Wanted("http-port", 8000, "", "process 1 (x)")).status is Status.OK
    assert ports.judge_port(ports.Wanted("http-port", 8000, "DYN_HTTP_PORT", "process 1 (x)")).status is Status.WARNING
    assert ports.judge_range("32768\t60999\n", {"etcd": 2379}).status is Status.OK
    assert ports.judge_range("1024\t60999\n", {"etcd": 2379}).found == "1024 to 60999, and in it etcd 2379"


# -- host -------------------------------------------------------------------------------------------------------------


def test_shared_memory() -> None:
    assert host.judge_shm(8 * GIB, 7 * GIB, 4).status is Status.OK
    little = host.judge_shm(GIB // 16, GIB // 16, 4)
    assert little.status is Status.WARNING
    assert "--shm-size=4g" in little.fix


def test_leftovers_are_what_no_process_has_open(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    for name in ("mapped", "left", "folder/inner", "young"):
        (tmp_path / name).write_bytes(b"x" * 10)
    segments = own_segments(str(tmp_path))
    assert {Path(one.path).name for one in segments} == {"mapped", "left", "inner", "young"}
    with (tmp_path / "mapped").open("rb"):
        used = paths_in_use(str(tmp_path))
    assert used == {str(tmp_path / "mapped")}
    aged = [Segment(one.path, one.size, 10.0 if "young" in one.path else 100.0) for one in segments]
    left = unused(aged, used)
    assert {Path(one.path).name for one in left} == {"left", "inner"}
    check = host.judge_leftovers(left)
    assert check.status is Status.WARNING
    assert f"rm {tmp_path}" in check.fix
    assert host.judge_leftovers([]).status is Status.OK
    assert mapped_path("7f00-7f01 rw-s 00000000 00:17 5          /dev/shm/a b\n") == "/dev/shm/a b"
    assert mapped_path("7f00-7f01 rw-p 00000000 00:00 0\n") == ""


def test_limits() -> None:
    infinite = resource.RLIM_INFINITY
    assert host.judge_locked_memory((infinite, infinite), needed=True).status is Status.OK
    assert host.judge_locked_memory((8 << 20, 8 << 20), needed=True).status is Status.WARNING
    assert host.judge_locked_memory((8 << 20, 8 << 20), needed=False).status is Status.OK
    assert host.judge_open_files((1024, infinite), 511).status is Status.OK
    assert host.judge_open_files((512, 512), 511).status is Status.ERROR
    assert host.judge_open_files((1024, 1024), 0).status is Status.WARNING
    assert host.judge_core((0, infinite)).found == "core dumps: none"


def test_cpus_and_memory() -> None:
    assert host.judge_cpus(1, 8, CgroupLimits(), in_rank=True).status is Status.WARNING
    assert host.judge_cpus(1, 8, CgroupLimits(), in_rank=False).status is Status.OK
    assert host.judge_cpus(8, 8, CgroupLimits(cpus=1.5), in_rank=True).found.endswith("the time of 1.5")
    full = host.judge_memory(CgroupLimits(memory=8 * GIB, memory_used=8 * GIB - 1), GIB)
    assert full.status is Status.WARNING
    assert host.judge_memory(CgroupLimits(), GIB).status is Status.OK


def test_cgroups_of_both_versions(tmp_path: Path) -> None:
    own = tmp_path / "own"
    own.write_text("0::/job/step\n")
    (tmp_path / "job" / "step").mkdir(parents=True)
    (tmp_path / "job" / "memory.max").write_text("1000\n")
    (tmp_path / "job" / "memory.current").write_text("10\n")
    (tmp_path / "job" / "step" / "memory.max").write_text("max\n")
    (tmp_path / "job" / "step" / "cpu.max").write_text("150000 100000\n")
    assert read_limits(tmp_path, own) == CgroupLimits(1.5, 1000, 10)
    (tmp_path / "job" / "memory.stat").write_text("anon 1\nactive_file 3\ninactive_file 4\n")
    (tmp_path / "memory.max").write_text("2000\n")
    (tmp_path / "memory.current").write_text("1995\n")
    assert read_limits(tmp_path, own) == CgroupLimits(1.5, 2000, 1995), "the group with the least left"
    (tmp_path / "memory.current").write_text("20\n")
    assert read_limits(tmp_path, own) == CgroupLimits(1.5, 1000, 3), "cached files can be given back"
    old = tmp_path / "v1"
    (old / "memory" / "job").mkdir(parents=True)
    own.write_text("5:memory:/job\n4:cpu,cpuacct:/\n")
    (old / "memory" / "job" / "memory.limit_in_bytes").write_text("500\n")
    (old / "memory" / "memory.limit_in_bytes").write_text("9223372036854771712\n")
    assert read_limits(old, own) == CgroupLimits(None, 500, 0)
    assert own_groups("0::/x\n5:memory:/y\n") == {"": "/x", "memory": "/y"}
    assert cpu_share("max 100000") is None
    assert cpu_share("-1 100000") is None


def test_a_temporary_folder_that_is_none(tmp_path: Path) -> None:
    assert next(iter(host.check_temporary(Context({"TMPDIR": str(tmp_path)})))).status is not Status.ERROR
    (missing,) = host.check_temporary(Context({"TMPDIR": str(tmp_path / "none")}))
    assert (missing.status, missing.code) == (Status.ERROR, 64)


# -- environment ------------------------------------------------------------------------------------------------------


def test_variables_that_harm() -> None:
    environ = {
        "TLLM_DISABLE_MPI": "1",
        "NCCL_P2P_DISABLE": "0",
        "OMPI_MCA_pmix": "^s1",
        "DYN_MPI_FAULT": "rank0:load:kill",
    }
    found = [check.id for check in environment.judge_variables(environ, in_rank=False)]
    assert found == ["TLLM_DISABLE_MPI", "OMPI_MCA_pmix", "DYN_MPI_FAULT"]
    assert [check.id for check in environment.judge_variables(environ, in_rank=True)] == [
        "TLLM_DISABLE_MPI",
        "DYN_MPI_FAULT",
    ]
    misspelt, _ = environment.check_variables(Context({"DYN_MPI_STAGEE": "/x", "DYN_MPI_STAGE": "/x"}))
    assert (misspelt.id, misspelt.status) == ("DYN_MPI_STAGEE", Status.WARNING)
    assert "is DYN_MPI_STAGE meant?" in misspelt.found
    mca = environment.describe_mca({"OMPI_MCA_btl": "s3cret", "PATH": ""})
    assert mca.found == "set: OMPI_MCA_btl"


@pytest.mark.parametrize(
    ("host_name", "exceptions", "free"),
    [
        ("n1", "", False),
        ("n1", "n1", True),
        ("n1.cluster", "localhost,.cluster", True),
        ("n1.cluster", "cluster", True),
        ("mycluster", "cluster", False),
        ("10.1.2.3", "10.0.0.0/8", True),
        ("10.1.2.3", "10.", False),
        ("n1", "*", True),
        ("127.0.0.1", "127.0.0.1:8080", True),
    ],
)
def test_what_no_proxy_leaves_out(host_name: str, exceptions: str, free: bool) -> None:
    assert environment.bypasses(host_name, exceptions) is free


def test_a_proxy_that_catches_the_clusters_own_services() -> None:
    environ = {"http_proxy": "http://me:hunter2@proxy:3128", "no_proxy": "localhost"}
    caught = environment.judge_proxies(environ, ["localhost", "127.0.0.1", "n1"])
    assert caught.status is Status.WARNING
    assert "no_proxy=localhost,127.0.0.1,n1 " in caught.fix
    assert "hunter2" not in str(caught)
    assert environment.judge_proxies({**environ, "no_proxy": "*"}, ["n1"]).status is Status.OK
    assert environment.judge_proxies({}, ["n1"]).status is Status.OK


def test_caches_that_can_not_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    environ = {"HF_HOME": str(tmp_path / "file" / "hub"), "HOME": str(tmp_path / "new")}
    found = by_id(tuple(environment.check_caches(Context(environ))))
    assert found["HF_HOME"].status is Status.WARNING
    assert found["HOME"].status is Status.OK
    assert not (tmp_path / "new").exists()
