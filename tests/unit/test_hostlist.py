# SPDX-License-Identifier: Apache-2.0
"""Slurm's lists of hosts, read without Slurm."""

from __future__ import annotations

import pytest

from dynamo_mpi.common.errors import UsageError
from dynamo_mpi.deploy.hostlist import expand
from dynamo_mpi.deploy.nodes import STAND_IN_JOB, of_dry_run

# as `scontrol show hostnames` writes them: tests/slurm/test_hostlist.py asks it
LISTS = {
    "n1": "n1",
    "n[1-4]": "n1 n2 n3 n4",
    "n[1-2,7],head": "n1 n2 n7 head",
    "n[08-11]": "n08 n09 n10 n11",
    "n[8-11]": "n8 n9 n10 n11",
    "n[098-101,7]": "n098 n099 n100 n101 n7",
    "r[1-2]n[01-02]": "r1n01 r1n02 r2n01 r2n02",
    "gpu-a.b_c[3],n2": "gpu-a.b_c3 n2",
    "[1-3]": "1 2 3",
}


@pytest.mark.parametrize("written", LISTS)
def test_a_list_has_the_hosts_that_slurm_gives_it(written: str) -> None:
    assert " ".join(expand(written, "--nodes")) == LISTS[written]


def test_a_host_is_named_once() -> None:
    assert expand("n[1-2],n1", "--nodes") == ("n1", "n2")


@pytest.mark.parametrize(
    "written",
    [
        *("", " ", ",", "n1,", "n1,,n2", "n[1-4", "n1-4]", "n[1-4]]", "n[4-1]", "n[]", "n[a-b]", "n[1-]", "n1;n2"),
        *("n 1", "n[[1]]", "n[1-99999]", "n[0-999][0-999]", "n[1-4]x"),
    ],
)
def test_what_is_no_list_is_refused_with_a_fix(written: str) -> None:
    with pytest.raises(UsageError) as caught:
        expand(written, "--nodes")
    assert str(caught.value).startswith(f"--nodes is {written!r}: ")
    assert caught.value.expected == "Slurm's list of nodes, such as n[1-4] or n1,n2"
    assert caught.value.fix


@pytest.mark.parametrize(("written", "why"), [("n[1-4", "a [ isn't closed"), ("n1-4],x", "a ] has no [ before it")])
def test_a_bracket_without_its_other_is_named(written: str, why: str) -> None:
    with pytest.raises(UsageError) as caught:
        expand(written, "--nodes")
    assert caught.value.problem == f"--nodes is {written!r}: {why}"


def test_a_dry_run_takes_the_nodes_of_the_list_and_the_head_of_this_step() -> None:
    nodes = of_dry_run({"SLURM_JOB_NODELIST": "n[1-3]", "SLURMD_NODENAME": "n2", "SLURM_JOB_ID": "7"}, 2)
    assert (nodes.names, nodes.head, nodes.job_id) == (("n1", "n2", "n3"), "n2", "7")


def test_a_dry_run_without_a_list_makes_up_nodes() -> None:
    nodes = of_dry_run({}, 2)
    assert (nodes.names, nodes.head, nodes.job_id) == (("node1", "node2"), "node1", STAND_IN_JOB)
