# SPDX-License-Identifier: Apache-2.0
"""A worker's ranks and ``dynamo.trtllm`` on the CPUs and the memory node of their GPUs, read back from /proc.

The GPUs are a stand-in's; their places are a sysfs of our own, mounted over /sys/bus/pci/devices in the launcher's mount namespace.
"""

from __future__ import annotations

import os
import shlex
import subprocess
from pathlib import Path

import pytest

from dynamo_mpi.common.affinity import POLICY_DEFAULT, memory_policy
from tests.conftest import ROOT, Mpirun
from tests.dynamo.running import EtcdServer, RunningWorker
from tests.dynamo.test_worker_trtllm import FLAGS, child_of
from tests.mpi.test_worker_trtllm import node_with

pytestmark = pytest.mark.dynamo
RANKS = 2
STAGES = ("--tensor-parallel-size", "1", "--pipeline-parallel-size", str(RANKS))
CPUS = sorted(os.sched_getaffinity(0))


def own_mounts(devices: Path) -> tuple[str, ...]:
    """Return the words before a command that let it see these PCI devices; skip where that can't be."""
    words = (
        "unshare",
        "--mount",
        "sh",
        "-ec",
        f'mount --bind {shlex.quote(str(devices))} /sys/bus/pci/devices; exec "$@"',
        "sh",
    )
    if (
        os.geteuid()
        or len(CPUS) < RANKS
        or subprocess.run([*words, "true"], capture_output=True, check=False).returncode
    ):
        pytest.skip("needs root, mounts and two CPUs")
    return words


@pytest.fixture
def machine(tmp_path: Path) -> tuple[str, ...]:
    """A machine with two GPUs, each next to one CPU."""
    for number, cpu in enumerate(CPUS[:RANKS]):
        device = tmp_path / "devices" / f"0000:{0xA0 + number:02x}:00.0"
        device.mkdir(parents=True)
        (device / "numa_node").write_text("0\n")
        (device / "local_cpulist").write_text(f"{cpu}\n")
    return own_mounts(tmp_path / "devices")


def variables(tmp_path: Path, policy: str = "none") -> dict[str, str]:
    """Return the environment of a node with two GPUs, whose launcher binds ranks by a policy."""
    paths = [os.environ.get("PYTHONPATH"), str(ROOT / "tests/standins"), str(ROOT)]
    return {
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        "DYN_GRACEFUL_SHUTDOWN_GRACE_PERIOD_SECS": "0.2",
        "OMP_NUM_THREADS": "1",
        "PRTE_MCA_hwloc_default_binding_policy": policy,
        "OMPI_MCA_hwloc_base_binding_policy": policy,
        # it doesn't bind where more ranks than cores are allowed
        "PRTE_MCA_rmaps_default_mapping_policy": "core" if policy == "core" else ":oversubscribe",
        **node_with(tmp_path, [0] * RANKS),
    }


def cpus_of(pid: int) -> set[str]:
    """Return the CPUs of all threads of a process."""
    found = set()
    for status in Path(f"/proc/{pid}/task").glob("*/status"):
        lines = dict(line.split(":\t", 1) for line in status.read_text().splitlines() if ":\t" in line)
        found.add(lines["Cpus_allowed_list"])
    return found


def policies_of(pid: int) -> set[str]:
    """Return the memory policies of a process's mappings."""
    return {line.split()[1] for line in Path(f"/proc/{pid}/numa_maps").read_text().splitlines()}


def kernel_has_numa() -> bool:
    try:
        return memory_policy() == POLICY_DEFAULT
    except OSError:
        return False


def test_ranks_and_child_run_next_to_their_gpus(
    tmp_path: Path, etcd: EtcdServer, small_model_dir: Path, machine: tuple[str, ...]
) -> None:
    flags = [flag for flag in FLAGS if flag != "--allow-no-gpu"]
    worker = RunningWorker(
        tmp_path,
        etcd,
        small_model_dir,
        RANKS,
        *flags,
        "--probe",
        "none",
        *STAGES,
        before=machine,
        **variables(tmp_path),
        DYN_LOG="info",
    )
    try:
        ranks = worker.ranks()
        (record,) = etcd.worlds()
        assert record.binding == {
            str(rank): {"kind": "bound", "cpus": str(CPUS[rank]), "node": 0} for rank in range(RANKS)
        }
        assert (
            f"binding: rank 0 will be bound to CPUs {CPUS[0]}, memory node 0; "
            f"rank 1 will be bound to CPUs {CPUS[1]}, memory node 0" in worker.text()
        )
        # which process is which rank is known of rank 0 alone
        assert [cpus_of(pid) for pid in ranks] == [{str(CPUS[0])}, {str(CPUS[1])}]
        child = child_of(worker)
        assert cpus_of(child) == {str(CPUS[0])}
        if kernel_has_numa():
            # a library asks for "local" for two mappings of its own: on the node of the CPUs too
            assert [policies_of(pid) - {"local"} for pid in (*ranks, child)] == [{"prefer:0"}] * 3
    finally:
        worker.stop()


def test_what_mpirun_has_bound_stays_and_is_a_warning(
    tmp_path: Path, mpirun: Mpirun, small_model_dir: Path, machine: tuple[str, ...]
) -> None:
    # rank 1 gets the CPU of rank 0's GPU, and the reverse
    words = [
        "-m",
        "dynamo_mpi.worker",
        "--model",
        str(small_model_dir),
        *STAGES,
        *FLAGS[:2],
        "--preflight-only",
    ]
    environment = variables(tmp_path, "core") | {"CUDA_VISIBLE_DEVICES": "1,0"}
    done = mpirun(RANKS, words, env=environment, before=machine)
    assert done.returncode == 0, done.stderr
    assert "warning V17: ranks are bound to CPUs that aren't next to their GPU: ranks 0-1 on " in done.stderr
    assert f"GPU 1 (0000:a1:00.0) is next to CPUs {CPUS[1]} (node 0), bound to CPUs {CPUS[0]}" in done.stderr
    assert "--bind-to none" in done.stderr
