# SPDX-License-Identifier: Apache-2.0
"""A rank's memory besides weights and KV cache (section J): rules of thumb, with an error of some GiB."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dynamo_mpi.layout.engine_config import DEFAULT_MAX_BATCH_SIZE, DEFAULT_MAX_NUM_TOKENS

if TYPE_CHECKING:
    from dynamo_mpi.layout.spec import LayoutSpec

_GIB = 2**30
_NCCL = int(0.35 * _GIB)
_OTHER = int(3.5 * _GIB)
_GRAPH = int(0.2 * _GIB)
_ALL_GRAPHS = _GIB  # graphs share a pool, so many need hardly more than the largest

# factors of the activations' rule of thumb, by tensor-parallel size (aiconfigurator 0.12)
_ACTIVATIONS = {
    "experts": {1: 22.0, 2: 13.0, 4: 10.0, 8: 10.0},
    "llama": {1: 11.0, 2: 6.5, 4: 5.0, 8: 5.0},
    "other": {1: 10.0, 2: 6.0, 4: 5.0, 8: 5.0},
}


def activation_bytes(subject: LayoutSpec) -> int:
    """Return the activations of the largest step, by a rule of thumb."""
    shape, config = subject.shape, subject.config
    ranks = max(size for size in (1, 2, 4, 8) if size <= subject.layout.attention_tp_size)
    width = (shape.attention_heads or 0) * (shape.value_size or 0) or shape.hidden_size or 0
    family = "other"
    if shape.experts is not None or shape.latent is not None:
        family = "experts"
    elif shape.name.lower().startswith("llama"):
        family = "llama"
    return int(2 * (config.max_num_tokens or DEFAULT_MAX_NUM_TOKENS) * width * _ACTIVATIONS[family][ranks])


def workspace_bytes(subject: LayoutSpec) -> int:
    """C4: return the workspace for the exchange of tokens between experts. It grows with attention DP, unless the engine config limits it."""
    experts, config, layout = subject.shape.experts, subject.config, subject.layout
    if experts is None or not experts.per_token:
        return 0
    tokens = config.moe.max_num_tokens or (config.max_num_tokens or DEFAULT_MAX_NUM_TOKENS) * layout.dp_size
    width = subject.shape.hidden_size or 0
    return 4 * tokens * width * experts.count * experts.per_token // max(1, layout.moe_ep_size) // 128


def outside_bytes(subject: LayoutSpec) -> int:
    """Return the memory outside torch: NCCL, CUDA graphs, and the rest."""
    config = subject.config
    graphs = 0
    if config.cuda_graphs:
        count = len(config.cuda_graph_batch_sizes or ())
        largest = config.cuda_graph_max_batch_size or config.max_batch_size or DEFAULT_MAX_BATCH_SIZE
        graphs = min(_ALL_GRAPHS, _GRAPH * (count or largest))
    return _OTHER + graphs + (_NCCL if subject.layout.world_size > 1 else 0)
