# SPDX-License-Identifier: Apache-2.0
"""Rules about MoE backends: names, and which of them runs which format on which GPU."""

from __future__ import annotations

import pytest

from dynamo_mpi.layout.layout import LayoutSpec
from dynamo_mpi.layout.rules import backends
from dynamo_mpi.layout.rules.registry import CONFIG_RULES, layout_findings
from tests.unit.test_rules_experts import R1_NVFP4, ranks, subject_of


def finding_ids(subject: LayoutSpec) -> list[str]:
    return [f"{finding.severity.value} {finding.rule}" for rule in backends.RULES for finding in rule(subject)]


@pytest.mark.parametrize(
    ("model", "backend", "expected"),
    [
        ("DeepSeek-R1", "TRTLLM", []),
        ("DeepSeek-R1", "trtllm", ["error D8"]),
        ("Llama-3.1-8B", "FLASHINFER", ["error D8"]),
        ("DeepSeek-R1", "WIDEEP", []),
    ],
)
def test_names(model: str, backend: str, expected: list[str]) -> None:
    assert finding_ids(subject_of(model, ranks(8, moe_config={"backend": backend}))) == expected


@pytest.mark.parametrize(
    ("model", "backend", "gpu", "version", "expected"),
    [
        ("DeepSeek-R1", "CUTLASS", "h200", None, []),
        ("DeepSeek-R1", "CUTLASS", None, None, []),
        ("DeepSeek-R1", "CUTLASS", "b200", None, ["error G"]),
        ("DeepSeek-R1", "CUTEDSL", "b200", None, ["error G"]),
        ("DeepSeek-R1", "TRTLLM", "b200", None, []),
        ("DeepSeek-R1", "DEEPGEMM", "gb300", None, []),
        ("DeepSeek-R1", "DEEPGEMM", "h100", None, ["warning D9"]),
        ("DeepSeek-R1", None, "b200", None, []),
        ("DeepSeek-R1", None, "b200", "1.1.0", ["error G"]),
        ("DeepSeek-R1", "AUTO", "b200", "1.2.1", []),
        ("DeepSeek-R1", "AUTO", "b200", "1.0.0", ["error D8"]),
        ("DeepSeek-R1", None, "l40s", None, ["error G"]),
        ("DeepSeek-R1", "VANILLA", "b200", None, []),
        ("DeepSeek-R1", "TRTLLM", "rtx-pro-6000", None, ["warning G3"]),
        ("DeepSeek-R1", "TRTLLM", "rtx-pro-6000", "1.2.0", ["error G3"]),
        ("DeepSeek-R1", "CUTLASS", "gb10", None, []),
        ("Mixtral-8x7B", "TRTLLM", "h100", None, ["warning D9"]),
        ("Mixtral-8x7B", "TRITON", "h100", None, []),
        ("Mixtral-8x7B", "TRITON", "a100", None, ["warning D9"]),
        ("gpt-oss-120b", "TRITON", "h100", None, []),
        ("gpt-oss-120b", "TRITON", "b200", None, ["warning D9"]),
        ("gpt-oss-120b", "MEGAMOE_DEEPGEMM", "b200", None, ["warning D9"]),
        ("gpt-oss-120b", None, "rtx-pro-6000", None, ["warning G"]),
        ("NVFP4", "MARLIN", "h100", None, []),
        ("NVFP4", "CUTLASS", "h100", None, ["error G"]),
        # section G says that NVFP4 doesn't run there
        ("NVFP4", "CUTLASS", "h100", "1.2.0", []),
        ("NVFP4", "CUTEDSL", "gb10", None, ["warning D9"]),
        ("NVFP4", "CUTEDSL", "b200", None, []),
    ],
)
def test_backends(model: str, backend: str | None, gpu: str | None, version: str | None, expected: list[str]) -> None:
    engine = ranks(2, 2) if backend is None else ranks(2, 2, moe_config={"backend": backend})
    subject = subject_of(R1_NVFP4 if model == "NVFP4" else model, engine, gpu, version)
    assert finding_ids(subject) == expected


def test_the_planner_does_not_judge_by_backends() -> None:
    assert set(backends.RULES) <= set(CONFIG_RULES)
    unknown = subject_of("DeepSeek-R1", ranks(8, 8, moe_config={"backend": "x"}), "b200")
    assert not [finding for finding in layout_findings(unknown) if finding.rule in ("D8", "D9", "G", "G3")]
