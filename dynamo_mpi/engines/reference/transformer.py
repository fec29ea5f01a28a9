# SPDX-License-Identifier: Apache-2.0
"""The forward pass of a llama model over one rank's shard."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from dynamo_mpi.engines.reference.attention import KeyValueCache, StepAttention
from dynamo_mpi.engines.reference.collectives import Collectives, Pipeline
from dynamo_mpi.engines.reference.shape import part_of
from dynamo_mpi.engines.reference.steps import StepPlan
from dynamo_mpi.engines.reference.weights import Float32Array, LayerWeights, Weights

_MATRIX_VECTOR_ROWS = 4
_MATRIX_KERNEL_ROWS = 8


class Transformer:
    """One rank's weights and KV cache; ``forward`` is collective.

    Args:
        weights: this rank's shard.
        collectives: communication with the other ranks of this stage.
        pipeline: communication with the other stages.
        tp_size: number of ranks of a stage.
        slots: number of sequences in the KV cache.
        positions: tokens per sequence.
    """

    def __init__(
        self,
        weights: Weights,
        collectives: Collectives,
        pipeline: Pipeline,
        tp_size: int,
        slots: int,
        positions: int,
    ) -> None:
        shape, share = weights.shape, weights.share
        self._weights = weights
        self._collectives = collectives
        self._pipeline = pipeline
        self._vocabulary_widths = tuple(len(part_of(shape.vocab_size, tp_size, rank)) for rank in range(tp_size))
        self._heads = len(share.query_heads)
        self._kv_heads = len(share.kv_heads)
        self.cache = KeyValueCache(len(weights.layers), slots, self._kv_heads, positions, shape.head_dim)
        self._rotations = _rotations(positions, shape.head_dim, shape.rope_theta)

    def forward(self, plan: StepPlan) -> Float32Array | None:
        """Run one step. Collective: every rank passes the same plan.

        Returns:
            On rank 0 the logits ``[parts with wants_logits, vocabulary]``, on the other ranks None.
        """
        weights, epsilon = self._weights, np.float32(self._weights.shape.rms_norm_eps)
        attention = StepAttention(plan, self.cache)
        rotation = self._rotations[attention.positions][:, None]
        if weights.embedding is not None:
            hidden = self._embed(plan, weights.embedding)
        else:
            hidden = self._pipeline.receive_hidden(plan.token_count, weights.shape.hidden_size)
        # exp(-x) of a very negative gate is infinite, and gate / infinity is 0, which is correct
        with np.errstate(over="ignore"):
            for index, layer in enumerate(weights.layers):
                normed = _rms_norm(hidden, layer.attention_norm, epsilon)
                hidden += self._attention(index, layer, normed, attention, rotation)
                normed = _rms_norm(hidden, layer.feed_forward_norm, epsilon)
                hidden += self._feed_forward(layer, normed)
        if not weights.stage.is_last:
            self._pipeline.send_hidden(hidden)
        return self._logits(plan, hidden)

    def _logits(self, plan: StepPlan, hidden: Float32Array) -> Float32Array | None:
        weights = self._weights
        last_rows = np.cumsum([len(part.token_ids) for part in plan.parts]) - 1
        wanted = last_rows[[part.wants_logits for part in plan.parts]]
        if not len(wanted):
            leads = weights.stage.is_first and weights.share.vocabulary.start == 0
            return np.empty((0, weights.shape.vocab_size), np.float32) if leads else None
        logits = None
        if weights.final_norm is not None and weights.head is not None:
            normed = _rms_norm(hidden[wanted], weights.final_norm, np.float32(weights.shape.rms_norm_eps))
            logits = self._collectives.gather_columns(_project(normed, weights.head), self._vocabulary_widths)
        return self._pipeline.return_logits(logits, len(wanted), weights.shape.vocab_size)

    def _embed(self, plan: StepPlan, embedding: Float32Array) -> Float32Array:
        """Return ``[tokens, hidden]``: each rank fills the rows of its tokens, the sum adds zeros to them."""
        vocabulary = self._weights.share.vocabulary
        token_ids = np.array([token for part in plan.parts for token in part.token_ids], np.intp)
        here = (token_ids >= vocabulary.start) & (token_ids < vocabulary.stop)
        rows = np.zeros((len(token_ids), self._weights.shape.hidden_size), np.float32)
        rows[here] = embedding[:, token_ids[here] - vocabulary.start].T
        return self._collectives.sum_over_ranks(rows)

    def _attention(
        self,
        index: int,
        layer: LayerWeights,
        normed: Float32Array,
        attention: StepAttention,
        rotation: NDArray[np.complex64],
    ) -> Float32Array:
        tokens, head_dim = len(normed), self._weights.shape.head_dim
        heads, kv_heads = self._heads, self._kv_heads
        projected = _project(normed, layer.query_key_value).reshape(tokens, heads + 2 * kv_heads, head_dim)
        # GGUF stores llama's query and key rows so that a pair to rotate is adjacent: one complex number.
        rotated = (projected[:, : heads + kv_heads].view(np.complex64) * rotation).view(np.float32)
        queries = rotated[:, :heads].reshape(tokens, kv_heads, heads // kv_heads, head_dim)
        queries = queries * np.float32(head_dim**-0.5)
        attended = attention(index, queries, rotated[:, heads:], projected[:, heads + kv_heads :])
        return self._collectives.sum_over_ranks(_project(attended.reshape(tokens, -1), layer.attention_output))

    def _feed_forward(self, layer: LayerWeights, normed: Float32Array) -> Float32Array:
        """SwiGLU (Shazeer, 2020): ``(silu(x W_gate) * x W_up) W_down``."""
        both = _project(normed, layer.gate_up)
        middle = both.shape[1] // 2
        gate = both[:, :middle]
        inner = np.exp(-gate)
        inner += 1
        np.divide(gate, inner, out=inner)
        inner *= both[:, middle:]
        return self._collectives.sum_over_ranks(_project(inner, layer.down))


def _rotations(positions: int, head_dim: int, theta: float) -> NDArray[np.complex64]:
    """Return ``exp(i * position * theta ** (-2 pair / head_dim))``, ``[positions, head_dim / 2]`` (Su et al., 2021)."""
    frequencies = theta ** (-np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    angles = np.outer(np.arange(positions), frequencies)
    rotations: NDArray[np.complex64] = np.exp(1j * angles).astype(np.complex64)
    return rotations


def _rms_norm(rows: Float32Array, weight: Float32Array, epsilon: np.float32) -> Float32Array:
    mean_square = np.einsum("ij,ij->i", rows, rows)[:, None] / np.float32(rows.shape[1])
    normed: Float32Array = rows * (1 / np.sqrt(mean_square + epsilon)) * weight
    return normed


def _project(rows: Float32Array, matrix: Float32Array) -> Float32Array:
    """Return ``rows @ matrix``, by the BLAS routine that is fastest for few rows.

    OpenBLAS's matrix product packs the whole matrix, which for 2 or 3 rows costs three times a matrix-vector
    product; and its kernels are made for multiples of 8 rows: 8 take less time than 5, 6 or 7.
    """
    count = len(rows)
    if count == 1:
        return rows @ matrix
    if count <= _MATRIX_VECTOR_ROWS:
        stacked: Float32Array = (rows[:, None] @ matrix)[:, 0]
        return stacked
    if count < _MATRIX_KERNEL_ROWS:
        padded = np.zeros((_MATRIX_KERNEL_ROWS, rows.shape[1]), np.float32)
        padded[:count] = rows
        return (padded @ matrix)[:count]
    return rows @ matrix
