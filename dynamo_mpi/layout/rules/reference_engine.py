# SPDX-License-Identifier: Apache-2.0
"""Limits of the reference engine that TensorRT-LLM doesn't have."""

from __future__ import annotations

from dynamo_mpi.common.light_typing import TYPE_CHECKING
from dynamo_mpi.layout.finding import error

if TYPE_CHECKING:
    from collections.abc import Iterator

    from dynamo_mpi.layout.finding import Finding
    from dynamo_mpi.layout.layout import LayoutSpec


def check_reference_engine(subject: LayoutSpec) -> Iterator[Finding]:
    """R1: the reference engine (`--engine reference`) supports tensor and pipeline parallelism, and dense models."""
    if subject.engine != "reference":
        return
    layout, experts = subject.layout, subject.shape.experts
    parts = [("context_parallel_size", str(layout.cp_size))] if layout.cp_size > 1 else []
    parts += [("enable_attention_dp", "true")] if layout.enable_attention_dp and layout.tp_size > 1 else []
    if parts:
        yield error(
            "R1",
            f"the reference engine has no {' and no '.join(key for key, _ in parts)}",
            found=", ".join(f"{key} {value}" for key, value in parts),
            expected="tensor_parallel_size and pipeline_parallel_size alone",
            fix="leave it out, or use the trtllm engine",
        )
    if experts is not None:
        yield error(
            "R1",
            "the reference engine has no experts",
            found=f"{subject.shape.name}: {experts.count} experts",
            expected="a dense llama model",
            fix="use another model, or the trtllm engine",
        )


RULES = (check_reference_engine,)
