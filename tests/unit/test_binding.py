# SPDX-License-Identifier: Apache-2.0
"""On which CPUs a rank runs: decided over sysfs trees as real machines have them, and done to a real process."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dynamo_mpi.checks.bind_rank import ENGINE_VARIABLE
from dynamo_mpi.checks.binding import RankBinding, as_record, check_binding, decide, describe, pack
from dynamo_mpi.checks.gpu_facts import GpuFacts, NodeGpus, visible_gpus
from dynamo_mpi.checks.gpu_place import GpuPlace, NumaNode, locate, pci_address, read_nodes, read_place
from dynamo_mpi.checks.host_facts import HostFacts
from dynamo_mpi.checks.rank_facts import RankFacts
from dynamo_mpi.common.affinity import (
    POLICY_DEFAULT,
    allowed_cpus,
    format_list,
    memory_policy,
    parse_list,
)
from dynamo_mpi.layout.finding import render
from tests.conftest import ROOT


class Machine(NamedTuple):
    """A machine: CPUs of each NUMA node, each GPU's node (and the node that its own memory is)."""

    cpus: Mapping[int, str]
    gpus: Sequence[int]
    own_memory: Sequence[int] = ()

    def write(self, folder: Path) -> None:
        """Write its sysfs."""
        nodes = folder / "devices/system/node"
        for number, cpus in self.cpus.items():
            node = nodes / f"node{number}"
            node.mkdir(parents=True)
            (node / "cpulist").write_text(f"{cpus}\n")
            distances = (
                10 if other == number else 40 if self.cpus[other] and cpus else self._apart(number, other)
                for other in self.cpus
            )
            (node / "distance").write_text(f"{' '.join(map(str, distances))}\n")
        (nodes / "online").write_text(f"{format_list(self.cpus)}\n")
        everything = format_list(cpu for cpus in self.cpus.values() for cpu in parse_list(cpus))
        for number, node_number in enumerate(self.gpus):
            device = folder / "bus/pci/devices" / address(number)
            device.mkdir(parents=True)
            (device / "numa_node").write_text(f"{node_number}\n")
            (device / "local_cpulist").write_text(f"{self.cpus.get(node_number, everything)}\n")

    def _apart(self, one: int, other: int) -> int:
        """Each Grace's GPUs are nearer to it than to the other."""
        hosts = [number for number, cpus in self.cpus.items() if cpus]
        rest = [number for number in self.cpus if number not in hosts]
        side = {
            **{number: index for index, number in enumerate(hosts)},
            **{number: index * len(hosts) // max(1, len(rest)) for index, number in enumerate(rest)},
        }
        return 80 if side[one] == side[other] else 120


def address(number: int) -> str:
    return f"0000:{number + 0x18:02x}:00.0"


# two sockets of 32 cores with two threads each, four GPUs on each: HGX H100
HGX = Machine({0: "0-31,64-95", 1: "32-63,96-127"}, (0, 0, 0, 0, 1, 1, 1, 1))
# two Graces of 72 cores; each GPU's memory is a node of its own, and 28 more are there for instances
GB200 = Machine({0: "0-71", 1: "72-143", **dict.fromkeys(range(2, 34), "")}, (0, 0, 1, 1), (2, 10, 18, 26))
# the same, if the kernel gives the GPU's own node for the device
GB200_OWN = GB200._replace(gpus=GB200.own_memory)
# one Grace, one Hopper
GH200 = Machine({0: "0-71", **dict.fromkeys(range(1, 9), "")}, (0,), (1,))
ONE_NODE = Machine({0: "0-15"}, (0, 0))
# one node, and a firmware that doesn't say
VIRTUAL = Machine({0: "0-31"}, (-1, -1))
# an EPYC with four nodes in each socket; GPUs at some of them
NPS4 = Machine(
    {number: f"{number * 8}-{number * 8 + 7},{number * 8 + 64}-{number * 8 + 71}" for number in range(8)},
    (3, 3, 1, 1, 7, 7, 5, 5),
)
UNKNOWN = Machine({0: "0-15", 1: "16-31"}, (-1, -1))


def gpus_of(machine: Machine, folder: Path, environ: Mapping[str, str] | None = None) -> NodeGpus:
    """Return what a rank sees there."""
    if not folder.exists():
        machine.write(folder)
    nodes = read_nodes(str(folder))
    gpus = tuple(
        GpuFacts(
            number,
            f"GPU-{number}",
            "NVIDIA",
            100,
            place=read_place(
                address(number), machine.own_memory[number] if machine.own_memory else -1, nodes, str(folder)
            ),
        )
        for number in range(len(machine.gpus))
    )
    return NodeGpus(gpus, visible_gpus(gpus, environ or {}), "580.1", 13000)


def rank_rows(
    machine: Machine,
    folder: Path,
    *,
    ranks: int = 0,
    allowed: str = "",
    masks: Sequence[str] = (),
    environ: Mapping[str, str] | None = None,
) -> list[RankFacts]:
    """Return the rows of ranks on one machine, whose job has some of its CPUs; each with a mask, or unbound."""
    gpus = gpus_of(machine, folder, environ)
    everything = tuple(sorted(cpu for cpus in machine.cpus.values() for cpu in parse_list(cpus)))
    job = tuple(sorted(parse_list(allowed))) if allowed else everything
    return [
        RankFacts(
            rank,
            "n1",
            HostFacts(
                rank == 0,
                "Open MPI",
                tuple(sorted(parse_list(masks[rank]))) if masks else job,
                tuple((environ or {}).items()),
                allowed=job,
            ),
            gpus,
        )
        for rank in range(ranks or len(gpus.visible))
    ]


def decided(rows: Sequence[RankFacts]) -> list[RankBinding]:
    return list(decide(rows, bind=True))


def test_two_sockets_with_four_gpus_each(tmp_path: Path) -> None:
    rows = rank_rows(HGX, tmp_path / "sys")
    bindings = decide(rows, bind=True)
    assert bindings[:4] == (RankBinding("bound", "0-31,64-95", 0),) * 4  # both threads of each core
    assert bindings[4:] == (RankBinding("bound", "32-63,96-127", 1),) * 4
    assert describe(bindings) == (
        "binding: ranks 0-3 will be bound to CPUs 0-31,64-95, memory node 0; "
        "ranks 4-7 will be bound to CPUs 32-63,96-127, memory node 1"
    )
    assert as_record(bindings)["4-7"] == {"kind": "bound", "cpus": "32-63,96-127", "node": 1}
    assert list(check_binding(rows, bindings)) == []


@pytest.mark.parametrize("machine", [GB200, GB200_OWN], ids=["its Grace", "its own memory"])
def test_gb200_never_gets_a_memory_only_node(tmp_path: Path, machine: Machine) -> None:
    rows = rank_rows(machine, tmp_path / "sys")
    assert (
        decided(rows) == [RankBinding("bound", "0-71", 0, "0-1")] * 2 + [RankBinding("bound", "72-143", 1, "0-1")] * 2
    )
    assert "memory nodes 0-1" in describe(decide(rows, bind=True))


def test_one_grace_has_no_cpus_to_choose_but_keeps_memory_out_of_its_gpu(tmp_path: Path) -> None:
    rows = rank_rows(GH200, tmp_path / "sys")
    bindings = decide(rows, bind=True)
    assert bindings == (RankBinding("same", "0-71", 0, "0"),)
    assert pack(bindings) == "0|same||0|0"
    assert describe(bindings) == "binding: rank 0 will be bound to memory nodes 0"
    assert list(check_binding(rows, bindings)) == []
    assert pack(decide(rows, bind=False)) == ""


@pytest.mark.parametrize(
    ("allowed", "mask", "said", "kind"),
    [
        ("0-71", "", None, "same"),  # a job with one Grace of two
        ("", "0-3", None, "fits"),
        ("", "72-75", None, "wrong"),
        ("72-143", "", None, "few"),
        ("", "", "0", "left"),
        ("", "72-75", "1", "left"),
    ],
)
def test_memory_is_kept_out_of_gb200s_gpus_whatever_becomes_of_the_cpus(
    tmp_path: Path, allowed: str, mask: str, said: str | None, kind: str
) -> None:
    environ = {} if said is None else {ENGINE_VARIABLE: said}
    masks = [mask] if mask else []
    rows = rank_rows(GB200, tmp_path / "sys", ranks=1, allowed=allowed, masks=masks, environ=environ)
    bindings = decide(rows, bind=True)
    assert pack(bindings) == f"0|{kind}||0|0-1"
    assert describe(bindings).endswith("will be bound to memory nodes 0-1")


@pytest.mark.parametrize("machine", [ONE_NODE, VIRTUAL], ids=["known", "not said"])
def test_on_one_node_there_is_nothing_to_bind(tmp_path: Path, machine: Machine) -> None:
    bindings = decide(rank_rows(machine, tmp_path / "sys"), bind=True)
    assert {binding.kind for binding in bindings} == {"same"}
    assert (describe(bindings), pack(bindings)) == ("", "")


def test_a_device_whose_node_is_not_known_is_left_alone(tmp_path: Path) -> None:
    bindings = decide(rank_rows(UNKNOWN, tmp_path / "sys"), bind=True)
    assert [binding.kind for binding in bindings] == ["unknown"] * 2
    assert as_record(bindings) == {}


def test_each_node_of_a_socket_that_is_cut_into_four(tmp_path: Path) -> None:
    bindings = decide(rank_rows(NPS4, tmp_path / "sys"), bind=True)
    assert [binding.node for binding in bindings] == [3, 3, 1, 1, 7, 7, 5, 5]
    assert bindings[0].cpus == "24-31,88-95"


def test_a_cpuset_that_leaves_out_half_of_each_socket(tmp_path: Path) -> None:
    rows = rank_rows(HGX, tmp_path / "sys", allowed="0-15,32-47")
    assert [binding[1] for binding in decided(rows)] == ["0-15"] * 4 + ["32-47"] * 4


def test_a_cpuset_that_leaves_out_a_socket(tmp_path: Path) -> None:
    rows = rank_rows(HGX, tmp_path / "sys", allowed="0-31,64-95")
    bindings = decide(rows, bind=True)
    # all the job's CPUs are next to the first four
    assert [binding.kind for binding in bindings] == ["same"] * 4 + ["few"] * 4
    (finding,) = check_binding(rows, bindings)
    text = render([finding])
    assert finding.rule == "V17" and "ranks 4-7 on n1" in text and "--exclusive" in text
    assert (
        "rank 4 on n1: GPU 4 (0000:1c:00.0) is next to CPUs 32-63,96-127 (node 1), the job's CPUs are 0-31,64-95"
        in text
    )
    assert pack(bindings) == ""


def test_fewer_cpus_than_ranks_are_too_few(tmp_path: Path) -> None:
    kinds = [binding[0] for binding in decided(rank_rows(HGX, tmp_path / "sys", allowed="0-31,32-34"))]
    assert kinds == ["bound"] * 4 + ["few"] * 4
    kinds = [binding[0] for binding in decided(rank_rows(HGX, tmp_path / "sys", allowed="0-31,32-35"))]
    assert kinds == ["bound"] * 8


def test_what_the_launcher_has_bound_is_left_and_judged(tmp_path: Path) -> None:
    # by rank, round robin over the sockets, as a launcher does that knows nothing of GPUs
    rows = rank_rows(HGX, tmp_path / "sys", masks=["0-31,64-95", "32-63,96-127"] * 4)
    bindings = decide(rows, bind=True)
    assert [binding.kind for binding in bindings] == [
        "fits",
        "wrong",
        "fits",
        "wrong",
        "wrong",
        "fits",
        "wrong",
        "fits",
    ]
    (finding,) = check_binding(rows, bindings)
    text = render([finding])
    assert "ranks 1, 3-4, 6 on n1" in text and "--cpu-bind=none" in text and "--bind-to none" in text
    assert "rank 1 on n1: GPU 1 (0000:19:00.0) is next to CPUs 0-31,64-95 (node 0), bound to CPUs 32-63,96-127" in text
    # TensorRT-LLM would unbind what fits; what doesn't is left to it
    assert pack(bindings) == "0,2|fits||0|;5,7|fits||1|"
    assert describe(bindings).startswith("binding: ranks 0, 2 bound by the launcher to CPUs 0-31,64-95; ")


@pytest.mark.parametrize(
    ("said", "mask", "kind"),
    [
        (None, "", "bound"),
        ("1", "", "bound"),  # the engine binds to the same CPUs, later
        ("0", "", "left"),
        ("", "", "left"),
        ("1", "32-63", "left"),  # the engine will correct it
        ("0", "32-63", "wrong"),
        ("0", "0-3", "fits"),
    ],
)
def test_the_engines_own_variable_decides(tmp_path: Path, said: str | None, mask: str, kind: str) -> None:
    environ = {} if said is None else {ENGINE_VARIABLE: said}
    rows = rank_rows(HGX, tmp_path / "sys", ranks=1, masks=[mask] if mask else (), environ=environ)
    assert decided(rows)[0][0] == kind


def test_without_binding_nothing_is_said(tmp_path: Path) -> None:
    rows = rank_rows(HGX, tmp_path / "sys", masks=["32"] * 8)
    bindings = decide(rows, bind=False)
    assert list(check_binding(rows, bindings)) == []
    assert (describe(bindings), pack(bindings)) == ("", "")


@pytest.mark.parametrize(
    ("visible", "ranks", "nodes"),
    [
        ("4,5,6,7", 4, [1, 1, 1, 1]),
        ("7,0", 2, [1, 0]),
        ("GPU-6,GPU-1", 2, [1, 0]),
    ],
)
def test_the_gpus_that_a_rank_sees_count(tmp_path: Path, visible: str, ranks: int, nodes: list[int]) -> None:
    rows = rank_rows(HGX, tmp_path / "sys", ranks=ranks, environ={"CUDA_VISIBLE_DEVICES": visible})
    assert [binding[2] for binding in decided(rows)] == nodes


def test_an_instance_is_next_to_its_gpus_cpus() -> None:
    cut = GpuFacts(
        1, "GPU-1", "NVIDIA", 90, mig=True, place=GpuPlace("0000:19:00.0", 1, "4-7"), instances=("MIG-a", "MIG-b")
    )
    node = NodeGpus((GpuFacts(0, "GPU-0", "NVIDIA", 90), cut), ("MIG-b",))
    assert node.place_of(0) == cut.place


def test_gpus_of_two_kinds_in_an_order_that_is_not_known() -> None:
    def both(first: str, second: str) -> GpuPlace | None:
        gpus = tuple(
            GpuFacts(number, f"GPU-{number}", name, 90, place=GpuPlace(address(number), 0, cpus))
            for number, (name, cpus) in enumerate((("A", first), ("B", second)))
        )
        return NodeGpus(gpus, visible_gpus(gpus, {})).place_of(1)

    assert both("0-3", "4-7") is None
    found = both("0-3", "0-3")
    assert found is not None and found.cpus == "0-3"


def test_what_nvml_calls_a_gpu() -> None:
    assert pci_address("00000000:3B:00.0") == "0000:3b:00.0"
    assert pci_address(b"00010000:01:00.0") == "10000:01:00.0"
    with pytest.raises(ValueError):
        pci_address("")


def test_a_machine_without_sysfs_says_nothing(tmp_path: Path) -> None:
    assert read_nodes(str(tmp_path)) == ()
    assert read_place("0000:00:00.0", -1, (), str(tmp_path)) == GpuPlace("0000:00:00.0")


def test_this_machines_nodes() -> None:
    assert {cpu for node in read_nodes() for cpu in node.cpus} >= set(os.sched_getaffinity(0))


@given(
    st.integers(-1, 40),
    st.frozensets(st.integers(0, 40)),
    st.lists(st.frozensets(st.integers(0, 40)), max_size=6),
)
def test_no_node_without_cpus_is_ever_chosen(node: int, local: frozenset[int], cpus: list[frozenset[int]]) -> None:
    nodes = tuple(NumaNode(number, some, {}) for number, some in enumerate(cpus))
    number, found = locate(node, local, nodes)
    assert number == -1 if not found else cpus[number] >= found


@given(st.frozensets(st.integers(0, 8191)))
def test_a_list_arrives_as_it_was(numbers: frozenset[int]) -> None:
    assert parse_list(format_list(numbers)) == numbers


BIND = """
import os, sys, threading, time
from dynamo_mpi.checks.bind_rank import bind_rank
begun = threading.Event()
threading.Thread(target=lambda: (begun.set(), time.sleep(60)), daemon=True).start()  # as MPI's
begun.wait()
said = []
bind_rank(sys.argv[1], 3, os.environ, said.append, said.append)
later = threading.Thread(target=time.sleep, args=(60,), daemon=True)
later.start()
for task in sorted(os.listdir("/proc/self/task"), key=int):
    lines = open(f"/proc/self/task/{task}/status").read().splitlines()
    print(*(line.split()[1] for line in lines if line.startswith("Cpus_allowed_list")))
block = bytearray(8 << 20)
maps = open("/proc/self/numa_maps").read().split("\\n")
print("policies", *sorted({line.split()[1] for line in maps if line}))
print("variable", os.environ.get("TLLM_NUMA_AWARE_WORKER_AFFINITY"))
print("child", os.popen("grep Cpus_allowed_list /proc/self/status; head -1 /proc/self/numa_maps").read().split())
print("said", *said)
"""


def bound(packed: str, *before: str, **environment: str) -> list[str]:
    """Let rank 3 bind itself in a process of its own, and return what it reads back."""
    environ = {name: value for name, value in os.environ.items() if name != ENGINE_VARIABLE} | {
        "PYTHONPATH": str(ROOT),
        **environment,
    }
    done = subprocess.run(
        [*before, sys.executable, "-c", BIND, packed], env=environ, capture_output=True, text=True, check=True
    )
    return done.stdout.splitlines()


def kernel_has_numa() -> bool:
    try:
        return memory_policy() == POLICY_DEFAULT
    except OSError:
        return False


needs_numa = pytest.mark.skipif(not kernel_has_numa(), reason="the kernel allows no memory policy here")


@needs_numa
def test_all_threads_and_children_run_on_the_cpus_and_allocate_on_the_node() -> None:
    cpu = str(max(os.sched_getaffinity(0)))
    *threads, policies, variable, child, said = bound(f"0-2|bound|0|0|;3-4|bound|{cpu}|0|")
    assert threads == [cpu] * 3
    assert policies == "policies prefer:0"
    assert variable == "variable 0"
    assert f"'{cpu}'" in child and "prefer:0" in child
    assert said == "said"


@needs_numa
def test_beside_gpus_whose_memory_is_a_node_only_the_others_are_used() -> None:
    cpu = str(min(os.sched_getaffinity(0)))
    assert "policies bind:0" in bound(f"3|bound|{cpu}|0|0")


@needs_numa
@pytest.mark.parametrize(("kind", "variable"), [("same", None), ("wrong", None), ("fits", "0")])
def test_a_rank_whose_cpus_stay_has_its_memory_bound(kind: str, variable: str | None) -> None:
    lines = bound(f"3|{kind}||0|0")
    assert lines[0] == format_list(os.sched_getaffinity(0))
    assert "policies bind:0" in lines and f"variable {variable}" in lines and lines[-1] == "said"


def test_tensorrt_llm_is_made_to_keep_what_the_launcher_has_bound_rightly() -> None:
    lines = bound("3|fits||0|")
    assert lines[0] == format_list(os.sched_getaffinity(0))
    assert "variable 0" in lines and not any("policies prefer" in line for line in lines)
    assert "variable 1" in bound("3|fits||0|", **{ENGINE_VARIABLE: "1"})


@needs_numa
def test_memory_is_bound_even_if_the_cpus_can_not_be() -> None:
    lines = bound("3|bound|8000|0|0")
    assert "policies bind:0" in lines and "variable None" in lines
    assert "policies default" in bound("3|bound|8000|0|")


@needs_numa
def test_what_the_user_has_set_is_kept() -> None:
    cpu = str(min(os.sched_getaffinity(0)))
    code = (
        "import os, sys; from dynamo_mpi.common.affinity import *; set_memory_policy(POLICY_BIND, [0]);"
        "os.execv(sys.executable, [sys.executable, *sys.argv[1:]])"
    )
    before = (sys.executable, "-c", code)
    done = subprocess.run(
        [*before, "-c", BIND, f"3|bound|{cpu}|0|"],
        env={**os.environ, "PYTHONPATH": str(ROOT), ENGINE_VARIABLE: "1"},
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert "policies bind:0" in done and "is kept" in done
    assert "variable 1" in done


def test_a_rank_that_is_not_named_is_left_alone() -> None:
    everything = format_list(os.sched_getaffinity(0))
    lines = bound("0-2|bound|0|0|")
    assert lines[0] == everything
    assert "variable None" in lines


def test_cpus_that_are_not_allowed_are_a_warning() -> None:
    lines = bound("3|bound|8000|0|")
    assert lines[0] == format_list(os.sched_getaffinity(0))
    assert "said this rank can't be bound to its GPU's CPUs, 8000: Invalid argument" in lines


def test_the_jobs_cpus_are_known_to_a_thread_that_is_bound() -> None:
    code = (
        "import os; from dynamo_mpi.common.affinity import allowed_cpus\n"
        "everything = os.sched_getaffinity(0); os.sched_setaffinity(0, {min(everything)})\n"
        "assert set(allowed_cpus()) >= everything, allowed_cpus(); assert os.sched_getaffinity(0) == {min(everything)}"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert set(allowed_cpus()) >= os.sched_getaffinity(0)


def test_a_staging_process_is_released() -> None:
    code = (
        "import os; from dynamo_mpi.common.affinity import *\n"
        "everything = os.sched_getaffinity(0); os.sched_setaffinity(0, {min(everything)})\n"
        "def policy():\n"
        "    try: return memory_policy()\n"
        "    except OSError: return None\n"
        "numa = policy() == POLICY_DEFAULT\n"
        "numa and set_memory_policy(POLICY_PREFERRED, [0])\n"
        "release(); assert os.sched_getaffinity(0) == everything; assert policy() in (POLICY_DEFAULT, None)\n"
        "numa and set_memory_policy(POLICY_BIND, [0])\n"
        "release(); assert not numa or policy() == POLICY_BIND\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
