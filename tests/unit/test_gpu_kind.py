# SPDX-License-Identifier: Apache-2.0
"""Kinds of GPU by what NVML says of them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dynamo_mpi.checks.gpu_facts import NodeGpus
from dynamo_mpi.checks.gpu_rules import kind_in, kind_of
from dynamo_mpi.layout.gpus import GPUS
from tests.unit.test_host_rules import B200, gpu, node, rows

MIB = 2**20
NAMES = {
    "a100": "NVIDIA A100-SXM4-80GB",
    "a100-40": "NVIDIA A100-PCIE-40GB",
    "l4": "NVIDIA L4",
    "l40s": "NVIDIA L40S",
    "h100": "NVIDIA H100 80GB HBM3",
    "h20": "NVIDIA H20",
    "gh200": "NVIDIA GH200 480GB",
    "h200": "NVIDIA H200",
    "b200": "NVIDIA B200",
    "gb200": "NVIDIA GB200",
    "b300": "NVIDIA B300 SXM6 AC",
    "gb300": "NVIDIA GB300",
    "rtx-pro-6000": "NVIDIA RTX PRO 6000 Blackwell Server Edition",
    "gb10": "NVIDIA GB10",
}


def test_every_kind_has_a_name() -> None:
    assert set(NAMES) == set(GPUS)


@pytest.mark.parametrize("kind", GPUS)
@pytest.mark.parametrize("less", [0, 0.02])
def test_each_kind_is_known_by_its_product(kind: str, less: float) -> None:
    one = GPUS[kind]
    assert kind_of(NAMES[kind], one.sm, int(one.memory * (1 - less))) == kind
    assert kind_of(NAMES[kind].upper(), one.sm, one.memory) == kind


@pytest.mark.parametrize(
    ("name", "sm", "mib", "kind"),
    [
        ("NVIDIA H100 PCIe", 90, 81559, "h100"),
        ("NVIDIA H800", 90, 81559, "h100"),  # the same to every rule
        ("Graphics Device", 90, 143771, "h200"),
        ("Graphics Device", 90, 97871, None),  # H20 or GH200
        ("Graphics Device", 90, 65536, None),
        ("NVIDIA H100 NVL", 90, 95830, None),  # no H20, though as large
        ("NVIDIA H20-3e", 90, 143771, None),
        ("NVIDIA H200", 90, 81559, None),
        ("NVIDIA H200", 100, 143771, None),
        ("NVIDIA GB10", 121, 0, "gb10"),  # its memory is the host's
        ("NVIDIA H100 80GB HBM3", 90, 0, "h100"),
        ("NVIDIA A100-SXM4-80GB", 80, 0, None),  # of two sizes
        ("Graphics Device", 121, 0, None),
        ("NVIDIA GeForce RTX 4090", 89, 24564, None),
        ("", 0, 0, None),
    ],
)
def test_what_is_not_certain_is_not_known(name: str, sm: int, mib: int, kind: str | None) -> None:
    assert kind_of(name, sm, mib * MIB) == kind


@given(st.text(max_size=30), st.sampled_from([80, 89, 90, 100, 103]), st.integers(0, 2**39))
def test_a_kind_has_the_memory_and_the_architecture_that_were_given(name: str, sm: int, size: int) -> None:
    kind = kind_of(name, sm, size)
    if kind is not None:
        assert GPUS[kind].sm == sm
        assert not size or abs(GPUS[kind].memory / size - 1) < 0.04


def test_a_world_has_a_kind_if_all_its_visible_gpus_are_of_it() -> None:
    assert kind_in(rows("aabb")) == "h100"
    mixed = node("a", gpus=(gpu("a", 0), gpu("a", 1, B200)))
    assert kind_in(rows("aa", [mixed] * 2)) is None
    assert kind_in(rows("aa", [mixed._replace(visible=("GPU-a-0",))] * 2)) == "h100"
    assert kind_in(rows("ab", [node("a", 1), node("b", 1, kind=B200)])) is None
    assert kind_in(rows("a", [node("a", kind=("NVIDIA Unheard-of", 90, 7))])) is None
    assert kind_in(rows("a", [NodeGpus()])) is None
    assert kind_in([]) is None
