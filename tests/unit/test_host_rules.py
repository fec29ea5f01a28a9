# SPDX-License-Identifier: Apache-2.0
"""Rules over hosts and GPUs: each one both ways."""

from __future__ import annotations

import inspect
import re
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dynamo_mpi.checks import gpu_rules, host_rules
from dynamo_mpi.checks import gpu_visibility as visibility_rules
from dynamo_mpi.checks.gpu_fabric import GpuFabric
from dynamo_mpi.checks.gpu_facts import GpuFacts, NodeGpus
from dynamo_mpi.checks.gpu_rules import check_gpus
from dynamo_mpi.checks.host_facts import HostFacts, StaleFile
from dynamo_mpi.checks.host_rules import check_hosts, weights_by_rank
from dynamo_mpi.checks.rank_facts import RankFacts, Requirements
from dynamo_mpi.layout.finding import Finding, render
from dynamo_mpi.layout.memory import MemoryEstimate, StageMemory
from tests.unit.test_gpu_facts import NODE
from tests.unit.test_host_facts import FACTS

GIB = 2**30
H100, H200, B200 = ("NVIDIA H100", 90, 80), ("NVIDIA H200", 90, 141), ("NVIDIA B200", 100, 179)
VERSIONS = (("tensorrt_llm", "1.3.0rc22"), ("torch", "2.9.0"), ("mpi4py", "4.1.1"))


def gpu(host: str, number: int, kind: tuple[str, int, int] = H100, *, used: int = 0, **others: Any) -> GpuFacts:
    name, sm, size = kind
    others = {"free_bytes": (size - used) * GIB, "used_bytes": used * GIB, **others}
    return GpuFacts(number, f"GPU-{host}-{number}", name, sm, size * GIB, **others)


def node(host: str = "n1", count: int = 2, sees: Sequence[int] | None = None, **others: Any) -> NodeGpus:
    kind = others.pop("kind", H100)
    gpus = others.pop("gpus", tuple(gpu(host, number, kind) for number in range(count)))
    visible = tuple(gpus[number].uuid for number in (range(len(gpus)) if sees is None else sees))
    return NodeGpus(**{"gpus": gpus, "visible": visible, "driver": "570.1", "cuda": 12080, **others})


GB200 = ("NVIDIA GB200", 100, 185)


def place(host: str, number: int, **others: Any) -> GpuFacts:
    """Return a GPU in an NVLink fabric over nodes, by default in clique 1."""
    fabric = GpuFabric(**{"state": 3, "cluster": "aa" * 16, "clique": 1, "health": 0xAA, **others})
    return gpu(host, number, GB200, fabric=fabric)


def rack(host: str, count: int = 1, gpus: tuple[GpuFacts, ...] = (), **others: Any) -> NodeGpus:
    return node(host, gpus=gpus or tuple(place(host, number, **others) for number in range(count)))


def facts(**others: Any) -> HostFacts:
    variables = tuple({"OMP_NUM_THREADS": "8", **others.pop("variables", {})}.items())
    others = {"cpus": tuple(range(32)), "versions": VERSIONS, "shm_bytes": 64 * GIB, "shm_free": 64 * GIB, **others}
    return HostFacts(
        others.pop("speaks_for_node", True), others.pop("mpi_library", "Open MPI v5.0.8"), variables=variables, **others
    )


def rows(
    hosts: str, gpus: Sequence[NodeGpus] | None = None, of_hosts: Sequence[HostFacts] | None = None
) -> list[RankFacts]:
    """Return a row for each letter of ``hosts``; by default each rank sees as many GPUs as ranks are on its node."""
    return [
        RankFacts(
            rank,
            host,
            of_hosts[rank] if of_hosts else facts(),
            gpus[rank] if gpus else node(host, hosts.count(host)),
        )
        for rank, host in enumerate(hosts)
    ]


def said(findings: Sequence[Finding]) -> list[str]:
    return [f"{finding.severity.value} {finding.rule}" for finding in findings]


def judge(some: Sequence[RankFacts], needs: Requirements = Requirements()) -> list[Finding]:  # noqa: B008 - immutable
    findings = check_hosts(some, needs)
    for finding in findings:
        assert finding.found and finding.expected and finding.fix, finding
    return findings


@pytest.mark.parametrize("hosts", ["a", "aa", "aabb", "aaaabbbbcccc", "abc"])
def test_a_good_world_has_nothing_to_say(hosts: str) -> None:
    assert judge(rows(hosts)) == []


# (hosts, each rank's GPUs, rules, words of the text)
VISIBLE: dict[str, tuple[str, list[NodeGpus], list[str], str]] = {
    "no NVML anywhere": ("aab", [NodeGpus(problem="the driver isn't loaded")] * 3, ["error V1"], "no rank sees a GPU"),
    "no nvidia-ml-py": ("aa", [NodeGpus(problem="pip install nvidia-ml-py")] * 2, ["error V1"], "pip install"),
    "no GPU anywhere": ("ab", [NodeGpus()] * 2, ["error V1"], "NVML shows no GPU: a, b"),
    "none on one node": ("ab", [node("a", 1), NodeGpus()], ["error V1"], "rank 1 on b"),
    "one GPU is lost": ("aa", [node("a", 2, problem="GPU 2: lost")] * 2, ["error V1"], "GPU 2: lost"),
    "a GPU for each task": ("aa", [node("a", 2, [0]), node("a", 2, [1])], ["error K9"], "--gpus-per-node=2"),
    "a GPU for each task, in cgroups": (
        "aa",
        [node("a", gpus=(gpu("a", 0),)), node("a", gpus=(gpu("a", 1),))],
        ["error K9"],
        "ranks 0-1 on a",
    ),
    "one rank on each node": ("ab", [node("a", 1), node("b", 1)], [], ""),
    "one of eight GPUs and one rank": ("ab", [node("a", 8, [3]), node("b", 8, [0])], [], ""),
    "different ones": ("aa", [node("a", 3, [0, 1]), node("a", 3, [1, 2])], ["error K9"], "different GPUs"),
    "another order": ("aa", [node("a", 2), node("a", 2, [1, 0])], ["error K9"], "order"),
    "half a node, the same half": ("aabb", [node("a", 4, [0, 1])] * 2 + [node("b", 4, [2, 3])] * 2, [], ""),
    "two ranks on one GPU": ("aa", [node("a", 1)] * 2, ["error K9"], "2 ranks would share 1 GPU"),
    "four ranks on two": ("aaaa", [node("a", 2)] * 4, ["error K9"], "--ntasks-per-node=2"),
    "two containers of one machine": ("ab", [node("m", 1)] * 2, ["error K9"], "GPU-m-0: ranks 0 on a and 1 on b"),
    "a whole node for fewer ranks": ("aa", [node("a", 8)] * 2, [], ""),
    "whole nodes for fewer ranks": (
        "aabb",
        [node("a", 8)] * 2 + [node("b", 8)] * 2,
        ["warning K9"],
        "rank 2 takes number 2",
    ),
    "some of a node for fewer ranks": ("aa", [node("a", 8, [0, 1, 2])] * 2, ["warning K9"], "3 of 8 GPUs"),
    "unequal counts": ("aab", [node("a", 2)] * 2 + [node("b", 1)], ["error G6"], "2 GPUs on a; 1 GPU on b"),
    "other architectures": (
        "ab",
        [node("a", 1), node("b", 1, kind=B200)],
        ["error G6"],
        "NVIDIA H100, SM90, 80.0 GiB on a",
    ),
    "another size": ("ab", [node("a", 1), node("b", 1, kind=H200)], ["warning G6"], "memory"),
    "another product": ("ab", [node("a", 1), node("b", 1, kind=("H100 PCIe", 90, 79))], ["warning G6"], "products"),
    "a mixed node": ("a", [node("a", gpus=(gpu("a", 0), gpu("a", 1, B200)))], ["error G6"], "SM100"),
    "the odd one is hidden": ("a", [node("a", gpus=(gpu("a", 0), gpu("a", 1, B200)), sees=[0])], [], ""),
    "one clique over nodes": ("ab", [rack("a"), rack("b")], [], ""),
    "cliques of one number in two clusters": (
        "aab",
        [rack("a", 2)] * 2 + [rack("b", 2, cluster="bb" * 16)],
        ["warning V16"],
        "clique 1 of cluster bbbbbbbb on b",
    ),
    "another clique on one node": (
        "abc",
        [rack("a"), rack("b", clique=2), rack("c")],
        ["warning V16"],
        "the GPUs are in 2 cliques, those of b apart from the others",
    ),
    "a node without a clique": (
        "abc",
        [rack("a"), rack("b", cluster=""), rack("c")],
        ["warning V16"],
        "no clique on b",
    ),
    "a GPU that has not joined": (
        "aabb",
        [rack("a", 2)] * 2 + [rack("b", gpus=(place("b", 0), place("b", 1, state=2)))] * 2,
        ["warning V16", "warning V16"],
        "GPU 1 on b: registration in progress",
    ),
    "a route is unhealthy": (
        "ab",
        [rack("a"), rack("b", health=0b01_0000)],
        ["warning V16"],
        "GPU 0 on b: a route is unhealthy",
    ),
    "NVSwitches in each node": ("ab", [rack("a", cluster=""), rack("b", cluster="")], [], ""),
    "one node of a rack, partly without a clique": (
        "aa",
        [rack("a", gpus=(place("a", 0), place("a", 1, cluster="")))] * 2,
        [],
        "",
    ),
    "another driver": ("ab", [node("a", 1), node("b", 1, driver="535.1")], ["warning V6"], "570.1 (CUDA 12.8) on a"),
    "another CUDA": ("ab", [node("a", 1), node("b", 1, cuda=13000)], ["warning V6"], "CUDA 13.0"),
    "MIG": ("a", [node("a", gpus=(gpu("a", 0, mig=True),))], ["error V8"], "rank 0 on a"),
    "an instance": ("a", [node("a", 1, visible=("MIG-1",))], ["error V8"], "whole GPUs"),
    "MIG on another GPU": ("a", [node("a", gpus=(gpu("a", 0), gpu("a", 1, mig=True)), sees=[0])], [], ""),
    "only numbers are known": ("aa", [node("a", 2, visible=("#0", "#1"))] * 2, [], ""),
}


@pytest.mark.parametrize("case", VISIBLE)
def test_which_gpus_ranks_see(case: str) -> None:
    hosts, gpus, rules, words = VISIBLE[case]
    findings = judge(rows(hosts, gpus))
    assert said(findings) == rules
    assert words in render(findings)


def test_an_empty_variable_is_distinguished_from_no_gpus() -> None:
    hidden = node("a", 2, [])
    for value, words in (("", "CUDA_VISIBLE_DEVICES is empty"), ("7", "'7' hides all 2 GPUs")):
        (finding,) = judge(rows("a", [hidden], [facts(variables={"CUDA_VISIBLE_DEVICES": value})]))
        assert finding.rule == "V1"
        assert words in finding.found


def test_without_gpus_by_permission_nothing_about_gpus_is_said() -> None:
    assert "--allow-no-gpu" in judge(rows("aa", [NodeGpus()] * 2))[0].fix
    assert judge(rows("aa", [NodeGpus()] * 2), Requirements(allow_no_gpu=True)) == []


@pytest.mark.parametrize(
    ("used", "others", "weights", "rule", "words"),
    [
        (0, {}, 0, "", ""),
        (1, {}, 0, "", ""),  # a daemon
        (2, {"holders": ((42, 2 * GIB),)}, 0, "warning V2", "78.0 GiB of 80.0 GiB free; pid 42 holds 2.0 GiB"),
        (20, {}, 0, "warning V2", "20.0 GiB held by processes that can't be seen"),
        (20, {"holders": ((42, 0),)}, 60, "warning V2", "pid 42"),
        (20, {"holders": ((42, 20 * GIB),)}, 61, "error V2", "weights take 61.0 GiB; pid 42 holds 20.0 GiB"),
        (0, {}, 90, "error V2", "no process holds memory"),
        (0, {"total_bytes": 0}, 90, "", ""),  # not known
    ],
)
def test_a_gpu_is_free(used: int, others: dict[str, Any], weights: int, rule: str, words: str) -> None:
    one = gpu("a", 1, used=used)._replace(**others)
    gpus = node("a", gpus=(gpu("a", 0), one))
    findings = judge(rows("aa", [gpus] * 2), Requirements((0, weights * GIB)))
    assert said(findings) == ([rule] if rule else [])
    assert words in render(findings)


def test_only_the_gpu_that_a_rank_takes_must_be_free() -> None:
    gpus = node("a", gpus=(gpu("a", 0), gpu("a", 1, used=70)))
    assert judge(rows("a", [gpus])) == []


def versions(**others: str) -> HostFacts:
    merged = {**dict(VERSIONS), **{name.replace("__", "-"): value for name, value in others.items()}}
    return facts(versions=tuple((name, value) for name, value in merged.items() if value))


@pytest.mark.parametrize(
    ("of_hosts", "rules", "words"),
    [
        ([versions(), versions(torch="2.8.0")], ["error D10"], "torch: 2.9.0 on a; 2.8.0 on b"),
        ([versions(), versions(flashinfer__python="0.5")], ["error D10"], "flashinfer-python: missing on a; 0.5 on b"),
        ([versions(), versions(tensorrt_llm="")], ["error D10"], "missing on b"),
        ([versions(nvidia__nccl__cu12="1"), versions(nvidia__nccl__cu13="2")], ["error D10"], "cu12, nvidia-nccl-cu13"),
        ([versions(), versions(mpi4py="3.1.4")], ["warning D10"], "mpi4py: 4.1.1 on a; 3.1.4 on b"),
        ([versions(), versions(mpi4py="", torch="")], ["error D10", "warning D10"], "torch: 2.9.0 on a; missing on b"),
        ([versions(tensorrt_llm="")] * 2, ["error D10"], "container"),
        ([versions(), facts(speaks_for_node=False, versions=(), shm_free=0)], [], ""),
        ([facts(mpi_library="MPICH Version: 4.2")] * 2, ["error K1"], "MPICH Version: 4.2: ranks 0 on a and 1 on b"),
        ([facts(), facts(mpi_library="Open MPI v4.1.6")], ["error K1"], "Open MPI v4.1.6: rank 1 on b"),
        ([facts(), facts(mpi_library="")], ["error K1"], "unknown"),
        ([facts(), facts(shm_free=GIB - 1)], ["warning V3"], "b: /dev/shm 1.0 GiB of 64.0 GiB free, 1 rank"),
        ([facts(), facts(shm_free=GIB)], [], ""),
        ([facts(), facts(shm_bytes=0, shm_free=0)], ["warning V3"], "b: /dev/shm not there"),
        (
            [facts(), facts(leftovers=(StaleFile("moe_shared_l0", 3 * GIB, 7300),))],
            ["warning V4"],
            "b: moe_shared_l0: 3.0 GiB, written 2 hours ago",
        ),
        (
            [facts(leftovers=tuple(StaleFile(f"moe_{i}", GIB, i) for i in range(9))), facts()],
            ["warning V4"],
            "moe_0, moe_1, moe_2 and 6 more: 9.0 GiB, written 0 seconds ago",
        ),
        (
            [facts(variables={"TRTLLM_X": "1"}), facts()],
            ["warning V7"],
            "TRTLLM_X: '1' on rank 0 on a; unset on rank 1 on b",
        ),
        ([facts(variables={"TRTLLM_X": "1"})] * 2, [], ""),
        ([facts(variables={"CUDA_VISIBLE_DEVICES": "0"}), facts(variables={"OMP_NUM_THREADS": "4"})], [], ""),
    ],
)
def test_what_hosts_need(of_hosts: list[HostFacts], rules: list[str], words: str) -> None:
    findings = judge(rows("ab", of_hosts=of_hosts))
    assert said(findings) == rules
    assert words in render(findings)


def test_the_line_that_removes_leftovers_names_the_hosts() -> None:
    left = facts(leftovers=(StaleFile("moe_shared", 1, 1),))
    (finding,) = judge(rows("ab", of_hosts=[facts(), left]))
    assert finding.fix.endswith("rm /dev/shm/moe_* on b")


def test_shared_memory_is_for_all_ranks_of_the_node() -> None:
    silent = facts(speaks_for_node=False, versions=(), shm_bytes=0, shm_free=0)
    assert judge(rows("aa", of_hosts=[facts(shm_free=2 * GIB), silent])) == []
    (finding,) = judge(rows("aaaa", of_hosts=[facts(shm_free=2 * GIB), *[silent] * 3]))
    assert "--shm-size=4g" in finding.fix


@pytest.mark.parametrize(
    ("threads", "cpus", "rule", "words"),
    [
        (["8", "8"], [range(16)] * 2, "", ""),
        (["8,2", "8"], [range(16)] * 2, "", ""),
        (["9", "9"], [range(16)] * 2, "warning V5", "2 ranks x 9 threads on 16 CPUs"),
        (["9", "9"], [range(16)] * 2, "warning V5", "export OMP_NUM_THREADS=8"),
        ([None, None], [range(16)] * 2, "warning V5", "export OMP_NUM_THREADS=8"),
        (["", "many"], [range(16)] * 2, "warning V5", "ranks 0-1 on a"),
        (["4", None], [range(16)] * 2, "warning V5", "rank 1 on a"),
        ([None, None], [range(8), range(8, 16)], "", ""),  # each has CPUs of its own
        (["1", "1"], [range(1), range(1, 2)], "warning V5", "--bind-to none"),
        (["1", "1", "1"], [range(2)] * 3, "", ""),  # nothing to export helps
        ([None, None], [(), ()], "", ""),  # not known
        ([None], [range(16)], "", ""),
    ],
)
def test_threads_fit_the_cpus(threads: list[str | None], cpus: list[Sequence[int]], rule: str, words: str) -> None:
    of_hosts = [
        HostFacts(
            True,
            "Open MPI v5",
            tuple(mine),
            () if count is None else (("OMP_NUM_THREADS", count),),
            VERSIONS,
            shm_free=64 * GIB,
        )
        for count, mine in zip(threads, cpus, strict=True)
    ]
    findings = judge(rows("a" * len(of_hosts), of_hosts=of_hosts))
    assert said(findings) == ([rule] if rule else [])
    assert words in render(findings)


def test_large_worlds_are_reported_briefly() -> None:
    hosts = [f"node{number}" for number in range(64) for _ in range(8)]
    world = [
        RankFacts(rank, host, facts(cpus=range(128)), node(host, 8, [rank % 8])) for rank, host in enumerate(hosts)
    ]
    findings = judge(world)
    assert said(findings) == ["error K9"]
    text = render(findings)
    assert "512 ranks on node0, node1, node2, node3, node4, node5 and 58 more" in text
    assert len(text) < 2000


def test_a_variable_that_is_another_in_each_rank_is_reported_briefly() -> None:
    of_hosts = [facts(variables={"TLLM_PORT": str(rank)}) for rank in range(9)]
    (finding,) = judge(rows("abcdefghi", of_hosts=of_hosts))
    assert finding.found.endswith("'3' on rank 3 on d; 5 more values")


def test_weights_of_each_rank() -> None:
    stages = tuple(StageMemory(i, 4, i * 2, 2, size, 0, 0, 0, 0) for i, size in enumerate((10, 20)))
    estimate = MemoryEstimate(stages, None, None, None, 0.9, 32, 1, None, None, 0)
    assert weights_by_rank(estimate) == (10, 10, 20, 20)
    assert weights_by_rank(None) == ()


@pytest.mark.parametrize("rule", [*gpu_rules.RULES, *host_rules.RULES], ids=lambda rule: rule.__name__)
def test_every_rule_begins_with_its_id_and_stands_in_its_modules_table(rule: Any) -> None:
    found = re.match(r"([A-Z]\d+(?:, [A-Z]\d+)*): \S", inspect.getdoc(rule) or "")
    assert found
    tables = "".join(module.__doc__ or "" for module in (visibility_rules, gpu_rules, host_rules))
    assert f"| {found[1].split(', ')[0]} |" in tables


@given(st.lists(st.tuples(st.sampled_from("abc"), FACTS, NODE), max_size=6), st.booleans(), st.data())
def test_no_rule_raises_for_any_rank_report(
    of_hosts: list[tuple[str, HostFacts, NodeGpus]], allowed: bool, data: st.DataObject
) -> None:
    world = [RankFacts(rank, *rest) for rank, rest in enumerate(of_hosts)]
    needs = Requirements(tuple(data.draw(st.lists(st.integers(0, 2**40), max_size=7))), allowed)
    render(judge(world, needs))
    if allowed:
        assert check_gpus(world, needs) == []
