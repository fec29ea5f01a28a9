# SPDX-License-Identifier: Apache-2.0
"""Section A: the world must be as large as the layout, and the sizes must be consistent. (TensorRT-LLM, ``mapping.py``)"""

from __future__ import annotations

from dynamo_mpi.common.light_typing import TYPE_CHECKING
from dynamo_mpi.layout.divisibility import divisors
from dynamo_mpi.layout.engine_config import AUTODEPLOY
from dynamo_mpi.layout.finding import error, info, warning
from dynamo_mpi.layout.format import counted, listed
from dynamo_mpi.layout.layout import HELIX
from dynamo_mpi.layout.rules.other_backends import refused_sizes
from dynamo_mpi.layout.value_rules import accepted_texts

if TYPE_CHECKING:
    from collections.abc import Iterator

    from dynamo_mpi.layout.finding import Finding
    from dynamo_mpi.layout.layout import LayoutSpec


def check_world_size(subject: LayoutSpec) -> Iterator[Finding]:
    """A1: the ranks are exactly ``tp * pp * cp`` (``MappingBase.__init__``)."""
    layout, started = subject.layout, subject.cluster.world_size
    if layout.world_size == started:
        return
    if not subject.launched and subject.cluster.nodes == 1 and layout.world_size < started:
        yield info(
            "A1",
            f"the layout takes {layout.world_size} of the node's {counted(started, 'GPU')}",
            fix=f"start {counted(layout.world_size, 'rank')}",
        )
        return
    if subject.config.backend == AUTODEPLOY:
        if refused_sizes(subject.config.keys) and not subject.config.keys.get("world_size"):
            return  # A16 has the fix; without world_size, the number of ranks isn't the user's choice
        yield error(
            "A1",
            f"AutoDeploy needs {counted(layout.world_size, 'rank')}, but there are {started}",
            found=f"world size {started}; world_size {layout.world_size} in the engine config",
            expected="the same number",
            fix=f"start {counted(layout.world_size, 'rank')}, or set world_size: {started}",
        )
        return
    product = f"tensor {layout.tp_size} x pipeline {layout.pp_size} x context {layout.cp_size}"
    yield error(
        "A1",
        f"the layout needs {counted(layout.world_size, 'rank')}, but there are {started}",
        found=f"world size {started}; {product} = {layout.world_size}",
        expected="world_size = tensor_parallel_size x pipeline_parallel_size x context_parallel_size",
        fix=f"start {counted(layout.world_size, 'rank')} (srun --ntasks={layout.world_size}, mpirun -n {layout.world_size}), "
        f"or set sizes whose product is {started}",
    )


def check_moe_product(subject: LayoutSpec) -> Iterator[Finding]:
    """A2: ``moe_tp * moe_ep * moe_cluster`` is tp, or tp x cp with HELIX; checked for dense models too (``MappingBase.__init__``)."""
    layout = subject.layout
    if layout.multiplies_out:
        return
    product = layout.moe_tp_size * layout.moe_ep_size * layout.moe_cluster_size
    over = "tp_size x cp_size" if layout.moe_world_size > layout.tp_size else "tp_size"
    given = [
        f"{name} {size}" + ("" if set_by is not None else " (the engine's default)")
        for name, size, set_by in (
            ("moe_tp_size", layout.moe_tp_size, subject.config.moe_tp_size),
            ("moe_ep_size", layout.moe_ep_size, subject.config.moe_ep_size),
            ("moe_cluster_size", layout.moe_cluster_size, subject.config.moe_cluster_size or 1),
        )
        if size != 1 or set_by is None
    ]
    if layout.moe_ep_size > layout.moe_world_size:
        message = f"ep_size {layout.moe_ep_size} is more than the {counted(layout.moe_world_size, 'rank')} that experts are divided over"
        because = f"; expert parallelism shares out the ranks of {over}, it adds none"
    else:
        message = f"experts can't be divided: {' x '.join(given)} is {product}, not {layout.moe_world_size}"
        because = ""
    yield error(
        "A2",
        message,
        found=f"{over} {layout.moe_world_size}, {', '.join(given)}: {product} != {layout.moe_world_size}{because}",
        expected=f"moe_tp_size x moe_ep_size x moe_cluster_size = {over} = {layout.moe_world_size}",
        fix=f"set moe_expert_parallel_size to one of {listed(_expert_sizes(subject))}, and leave moe_tensor_parallel_size out",
    )


def check_dense_experts(subject: LayoutSpec) -> Iterator[Finding]:
    """A3: expert sizes have no meaning for a model without experts."""
    config, shape = subject.config, subject.shape
    if shape.experts is None and shape.layers is not None and max(config.moe_ep_size or 1, config.moe_tp_size or 1) > 1:
        yield warning(
            "A3",
            f"{shape.name} has no experts to divide",
            found=f"moe_expert_parallel_size {config.moe_ep_size}, moe_tensor_parallel_size {config.moe_tp_size}",
            expected="neither, for a dense model",
            fix="leave moe_expert_parallel_size and moe_tensor_parallel_size out",
        )


def _expert_sizes(subject: LayoutSpec) -> list[int]:
    experts = subject.shape.experts
    return [ep for ep in divisors(subject.layout.moe_world_size) if experts is None or experts.count % ep == 0]


def check_context_experts(subject: LayoutSpec) -> Iterator[Finding]:
    """A5: expert parallelism under context parallelism is for HELIX alone, since 1.2 (``MappingBase.__init__``)."""
    layout = subject.layout
    if layout.cp_size > 1 and layout.moe_ep_size > 1 and not (layout.is_helix and layout.experts_over_cp):
        yield error(
            "A5",
            f"context parallelism of type {layout.cp_type} can't be combined with expert parallelism",
            found=f"cp_size {layout.cp_size}, cp_type {layout.cp_type}, ep_size {layout.moe_ep_size}",
            expected=f"ep_size 1, or cp_type {HELIX} of TensorRT-LLM 1.2 or newer",
            fix=f"set cp_config: {{cp_type: {HELIX}}} on a decode worker, or moe_expert_parallel_size: 1",
        )


def check_clusters(subject: LayoutSpec) -> Iterator[Finding]:
    """A6, D7: a smart router (``moe_cluster > 1``) is neither for expert parallelism nor for every backend."""
    layout, backend = subject.layout, (subject.config.moe.backend or "").upper()
    if layout.moe_cluster_size == 1:
        return
    if layout.moe_ep_size > 1:
        yield error(
            "A6",
            "moe_cluster_parallel_size can't be combined with expert parallelism",
            found=f"moe_cluster_size {layout.moe_cluster_size}, ep_size {layout.moe_ep_size}",
            expected="ep_size 1",
            fix="leave moe_cluster_parallel_size out: it is deprecated",
        )
    if backend in ("TRTLLM", "TRITON"):
        yield error(
            "D7",
            f"the MoE backend {backend} has no smart router",
            found=f"moe_cluster_size {layout.moe_cluster_size}, moe_config.backend {backend}",
            expected="moe_cluster_size 1",
            fix="leave moe_cluster_parallel_size out: it is deprecated",
        )


def check_lm_head(subject: LayoutSpec) -> Iterator[Finding]:
    """A7: slicing the LM head under attention DP needs attention DP."""
    if subject.config.enable_lm_head_tp_in_adp and not subject.config.enable_attention_dp:
        yield error(
            "A7",
            "enable_lm_head_tp_in_adp is set without attention DP",
            found="enable_lm_head_tp_in_adp true, enable_attention_dp false",
            expected="enable_attention_dp: true",
            fix="set enable_attention_dp: true, or leave enable_lm_head_tp_in_adp out",
        )


def check_context_type(subject: LayoutSpec) -> Iterator[Finding]:
    """A8, B5, F8: context parallelism exists for HELIX alone; the other names pass the mapping and fail in attention."""
    cp_type, cp_size = subject.config.cp_type, subject.layout.cp_size
    known = accepted_texts("cp_config.cp_type", subject.version)
    if cp_type is not None and cp_type not in known:
        yield error(
            "A8",
            f"cp_type {cp_type} doesn't exist",
            found=f"cp_config.cp_type {cp_type}",
            expected=f"one of {', '.join(known)}",
            fix=f"set cp_config: {{cp_type: {HELIX}}}, or leave cp_config out",
        )
    elif cp_size > 1 and subject.layout.cp_type != HELIX:
        said = cp_type or f"{subject.layout.cp_type} (the engine's default)"
        yield error(
            "B5",
            f"attention has no context parallelism of type {subject.layout.cp_type}",
            found=f"cp_size {cp_size}, cp_type {said}",
            expected=f"cp_type {HELIX}, on a decode worker",
            fix=f"set cp_config: {{cp_type: {HELIX}}} on a decode worker, or context_parallel_size: 1",
        )


def check_gpus_per_node(subject: LayoutSpec) -> Iterator[Finding]:
    """A10, A11, H16, K9: the engine computes nodes as ``rank // gpus_per_node``, so the config's value must be the real one."""
    said, cluster = subject.config.gpus_per_node, subject.cluster
    if subject.engine == "reference":
        return
    if said is None and cluster.nodes > 1:
        yield info(
            "A10",
            "gpus_per_node isn't set: the engine takes what the leader's node shows for all nodes",
            found=f"{cluster}, no gpus_per_node",
            expected="gpus_per_node in the engine config",
            fix=f"set gpus_per_node: {cluster.gpus_per_node}",
        )
    # ranks beyond the world aren't there: rank // gpus_per_node is the same for all of them if both values reach over the world
    ranks = subject.layout.world_size
    if said is None or min(said, ranks) == min(cluster.gpus_per_node, ranks):
        return
    yield error(
        "A10",
        f"gpus_per_node is {said}, but each node has {cluster.gpus_per_node}",
        found=f"gpus_per_node {said}; {cluster}",
        expected=f"gpus_per_node {cluster.gpus_per_node}: the engine takes rank // gpus_per_node for the node",
        fix=f"set gpus_per_node: {cluster.gpus_per_node}",
    )


def check_placement(subject: LayoutSpec) -> Iterator[Finding]:
    """A14: a tensor-parallel group that leaves its node is legal, and slow without NVLink between the nodes."""
    layout, cluster = subject.layout, subject.cluster
    if layout.world_size != cluster.world_size or not layout.leaves_nvlink(cluster) or subject.engine == "reference":
        return
    if layout.enable_attention_dp and layout.moe_tp_size == 1 and subject.shape.experts is not None:
        return  # only the experts' all-to-all crosses nodes, which is the purpose of wide expert parallelism
    group = layout.tp_size * layout.cp_size
    yield warning(
        "A14",
        f"tensor-parallel groups of {group} ranks reach over nodes of {cluster.gpus_per_node} GPUs, without NVLink between them",
        found=f"tp x cp = {group}, gpus_per_node {cluster.gpus_per_node}",
        expected="tp x cp that divides the GPUs of a node; if NVLink joins nodes (NVL72), use --gpu gb200",
        fix="use pipeline stages over nodes, or attention DP with wide expert parallelism",
    )


RULES = (
    check_world_size,
    check_moe_product,
    check_dense_experts,
    check_context_experts,
    check_clusters,
    check_lm_head,
    check_context_type,
    check_gpus_per_node,
    check_placement,
)
