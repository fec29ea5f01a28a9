# SPDX-License-Identifier: Apache-2.0
"""One rank's share of a llama model, as float32 matrices.

Column-parallel: query/key/value, gate/up, vocabulary. Row-parallel: attention output, down. The split is that of
Shoeybi et al., "Megatron-LM", 2019, section 3.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dynamo_mpi.engines.reference.gguf_file import GgufFile
from dynamo_mpi.engines.reference.gguf_tensors import Float32Array, GgufTensors
from dynamo_mpi.engines.reference.pipeline import Stage, stage_of
from dynamo_mpi.engines.reference.shape import LlamaShape, Share, llama_shape, share_of

_KNOWN_TENSOR = re.compile(
    r"(token_embd|output_norm|output|blk\.\d+\.(attn_(norm|q|k|v|output)|ffn_(norm|gate|up|down)))\.weight"
)


@dataclass(frozen=True)
class LayerWeights:
    """One layer. Matrices are ``[in, out]``, so that a step computes ``x @ matrix``.

    Args:
        attention_norm: ``[hidden]``.
        query_key_value: ``[hidden, (query + 2 * kv heads) * head_dim]``, in this order.
        attention_output: ``[query heads * head_dim, hidden]``.
        feed_forward_norm: ``[hidden]``.
        gate_up: ``[hidden, 2 * intermediate]``, the gate first.
        down: ``[intermediate, hidden]``.
    """

    attention_norm: Float32Array
    query_key_value: Float32Array
    attention_output: Float32Array
    feed_forward_norm: Float32Array
    gate_up: Float32Array
    down: Float32Array


@dataclass(frozen=True)
class Weights:
    """All that one rank holds.

    Args:
        shape: of the whole model.
        share: of this rank.
        stage: which of the pipeline's stages this is.
        layers: of this stage, from the first to the last.
        embedding: ``[hidden, vocabulary]``; None but on the first stage.
        final_norm: ``[hidden]``; None but on the last stage.
        head: ``[hidden, vocabulary]``, the embedding itself where the model ties them; None but on the last stage.
    """

    shape: LlamaShape
    share: Share
    stage: Stage
    layers: tuple[LayerWeights, ...]
    embedding: Float32Array | None
    final_norm: Float32Array | None
    head: Float32Array | None


def load_weights(path: Path, rank: int, tp_size: int, pp_size: int = 1) -> Weights:
    """Read and decode what ``rank`` of ``tp_size * pp_size`` holds of the model in a GGUF file.

    Raises:
        ModelError: the file can't be read or holds a model this engine doesn't compute.
        LayoutError: the model can't be split into ``tp_size`` shares of ``pp_size`` stages.
    """
    file = GgufFile(path)
    shape = llama_shape(file)
    share = share_of(shape, rank % tp_size, tp_size)
    stage = stage_of(shape.num_hidden_layers, rank, tp_size, pp_size)
    for name in file.tensors:
        # A tensor left aside (a bias, an expert, rope factors) would not fail: it would make wrong tokens.
        if not _KNOWN_TENSOR.fullmatch(name):
            raise file.malformed(f"it holds tensor {name}, which the reference engine does not know")
    tensors = GgufTensors(file)
    hidden = shape.hidden_size
    tied = "output.weight" not in file.tensors
    embedding = None
    if stage.is_first or (stage.is_last and tied):
        embedding = _vocabulary_matrix(tensors, "token_embd.weight", shape, share)
    return Weights(
        shape=shape,
        share=share,
        stage=stage,
        layers=tuple(_load_layer(tensors, f"blk.{index}.", shape, share) for index in stage.layers),
        embedding=embedding if stage.is_first else None,
        final_norm=tensors.vector("output_norm.weight", hidden) if stage.is_last else None,
        head=_head(tensors, embedding, shape, share, tied=tied) if stage.is_last else None,
    )


def _head(
    tensors: GgufTensors, embedding: Float32Array | None, shape: LlamaShape, share: Share, *, tied: bool
) -> Float32Array | None:
    return embedding if tied else _vocabulary_matrix(tensors, "output.weight", shape, share)


def _load_layer(tensors: GgufTensors, prefix: str, shape: LlamaShape, share: Share) -> LayerWeights:
    hidden, head_dim = shape.hidden_size, shape.head_dim
    queries, keys = _head_columns(share.query_heads, head_dim), _head_columns(share.kv_heads, head_dim)
    all_queries, all_keys = shape.num_attention_heads * head_dim, shape.num_key_value_heads * head_dim
    inner, columns = shape.intermediate_size, share.intermediate

    query_key_value = np.empty((hidden, len(queries) + 2 * len(keys)), np.float32)
    after_queries, after_keys = len(queries), len(queries) + len(keys)
    tensors.fill_transposed(
        query_key_value[:, :after_queries], prefix + "attn_q.weight", (all_queries, hidden), queries
    )
    tensors.fill_transposed(
        query_key_value[:, after_queries:after_keys], prefix + "attn_k.weight", (all_keys, hidden), keys
    )
    tensors.fill_transposed(query_key_value[:, after_keys:], prefix + "attn_v.weight", (all_keys, hidden), keys)

    gate_up = np.empty((hidden, 2 * len(columns)), np.float32)
    tensors.fill_transposed(gate_up[:, : len(columns)], prefix + "ffn_gate.weight", (inner, hidden), columns)
    tensors.fill_transposed(gate_up[:, len(columns) :], prefix + "ffn_up.weight", (inner, hidden), columns)

    attention_output = np.empty((len(queries), hidden), np.float32)
    tensors.fill_transposed(
        attention_output, prefix + "attn_output.weight", (hidden, all_queries), range(hidden), queries
    )
    down = np.empty((len(columns), hidden), np.float32)
    tensors.fill_transposed(down, prefix + "ffn_down.weight", (hidden, inner), range(hidden), columns)
    return LayerWeights(
        attention_norm=tensors.vector(prefix + "attn_norm.weight", hidden),
        query_key_value=query_key_value,
        attention_output=attention_output,
        feed_forward_norm=tensors.vector(prefix + "ffn_norm.weight", hidden),
        gate_up=gate_up,
        down=down,
    )


def _vocabulary_matrix(tensors: GgufTensors, name: str, shape: LlamaShape, share: Share) -> Float32Array:
    matrix = np.empty((shape.hidden_size, len(share.vocabulary)), np.float32)
    tensors.fill_transposed(matrix, name, (shape.vocab_size, shape.hidden_size), share.vocabulary)
    return matrix


def _head_columns(heads: range, head_dim: int) -> range:
    return range(heads.start * head_dim, heads.stop * head_dim)
