# SPDX-License-Identifier: Apache-2.0
"""Bytes of a token in the KV cache, and of a request in a hybrid model's states (section J)."""

from __future__ import annotations

from collections import Counter
from math import ceil

from dynamo_mpi.common.light_typing import TYPE_CHECKING
from dynamo_mpi.layout.engine_config import DEFAULT_TOKENS_PER_BLOCK
from dynamo_mpi.layout.layer_weights import HEAVILY_COMPRESSED, dtype_bytes
from dynamo_mpi.layout.model_shape import Mixer
from dynamo_mpi.layout.weights import mtp_layer

if TYPE_CHECKING:
    from collections.abc import Iterator

    from dynamo_mpi.layout.layout import LayoutSpec
    from dynamo_mpi.layout.model_shape import AttentionSizes, ModelShape
    from dynamo_mpi.layout.weights import StageWeights

_SAME_DTYPE = {"half": "float16", "fp16": "float16", "bf16": "bfloat16", "float": "float32", "fp32": "float32"}
_BYTES = {"fp8": 1.0, "int8": 1.0, "bfloat16": 2.0, "float16": 2.0, "float32": 4.0, "nvfp4": 0.5 + 1 / 16}
_STATE_BYTES = 4  # of an unknown type: float32 in most checkpoints that specify it


def tokens_per_block(subject: LayoutSpec) -> int:
    """H8: return the tokens of a block that the attention backend uses: FlashMLA and VANILLA have their own sizes."""
    backend = (subject.config.attn_backend or "").upper()
    if backend == "FLASHMLA":
        return 64
    if backend == "VANILLA" and subject.config.max_num_tokens is not None:
        return subject.config.max_num_tokens
    return subject.config.kv_cache.tokens_per_block or DEFAULT_TOKENS_PER_BLOCK


def resolve_kv_dtype(subject: LayoutSpec) -> str | None:
    """Return the type of keys and values, under its full name; ``auto`` is the type for which the checkpoint was calibrated, else the
    model's.

    Returns:
        ``fp8``, ``nvfp4``, ``bfloat16`` and so on; None if neither config specifies it.
    """
    said, shape = subject.config.kv_cache.dtype.lower(), subject.shape
    if said == "auto":
        calibrated = shape.quantisation.kv_algo if shape.quantisation is not None else None
        said = (calibrated or shape.dtype or "").lower()
    return _SAME_DTYPE.get(said, said) or None


def kv_element_bytes(subject: LayoutSpec) -> float:
    """Return the bytes of one element of the KV cache; for an unknown type, those of the model's type."""
    return _BYTES.get(resolve_kv_dtype(subject) or "", float(dtype_bytes(subject.shape)))


def kv_dtype_known(subject: LayoutSpec) -> bool:
    """Return whether the size of the KV cache's elements is known; otherwise the model's is used."""
    name, own = resolve_kv_dtype(subject), (subject.shape.dtype or "").lower()
    return name is None or name in _BYTES or name == _SAME_DTYPE.get(own, own)


def kv_bytes(subject: LayoutSpec, held: StageWeights) -> tuple[int, tuple[tuple[int, int], ...]]:
    """Return the bytes of a token in a stage's layers without a window, and in those of each window."""
    ranks, element = subject.layout.attention_tp_size, kv_element_bytes(subject)
    counts = Counter(_attention_layers(subject, held))
    extra = mtp_layer(subject)
    if extra is not None and held.stage == subject.layout.pp_size - 1:
        counts[None, extra[0].sizes] += extra[1]
    sizes = Counter[int | None]()
    shared = 0.0
    for (window, own), count in counts.items():
        if own.shares_kv:
            continue
        sizes[window] += count * _layer_bytes(subject.shape, own, ranks, element)
        if own.compress_ratio:
            shared += count * _compressed_bytes(subject.shape, own, element)
    return sizes[None] + ceil(shared), tuple(sorted((w, size) for w, size in sizes.items() if w is not None))


def _attention_layers(subject: LayoutSpec, held: StageWeights) -> Iterator[tuple[int | None, AttentionSizes]]:
    """The window and the sizes of each attention layer of a stage; None for no limit."""
    kinds, order = subject.shape.kinds
    said, length = subject.config.kv_cache.max_attention_window, subject.config.max_seq_len
    for index in range(held.first_layer, held.first_layer + held.layers):
        layer = kinds[order[index]]
        if layer.mixer is not Mixer.ATTENTION:
            continue
        window = layer.window if not said else max(1, said[index % len(said)])
        beyond = window is not None and said and length is not None and window >= length
        yield None if beyond else window, layer.sizes


def _layer_bytes(shape: ModelShape, own: AttentionSizes, ranks: int, element: float) -> int:
    # keys of the sparse-attention indexer in FP8, with a scale for each 128; DeepSeek-V4's are compressed
    index = shape.index_head_dim if own.indexed and shape.compressed is None else None
    indexer = index + 4 * -(-index // 128) if index else 0
    if shape.latent is not None:
        return _packed(shape.latent.kv_lora_rank + (shape.latent.qk_rope_head_dim or 0), element) + indexer
    heads = -(-(own.kv_heads or shape.kv_heads or 0) // ranks)
    if shape.compressed is not None:  # one head that is key and value
        return _packed(heads * shape.head_sizes(own)[0], element)
    return _packed(heads * sum(shape.head_sizes(own)), element) + indexer


def _compressed_bytes(shape: ModelShape, own: AttentionSizes, element: float) -> float:
    """DeepSeek-V4: an entry for `compress_ratio` tokens, beside those in the window; with it one of the indexer where there is one."""
    size = _packed(own.kv_heads or shape.kv_heads or 1, element) * (own.head_dim or shape.head_dim or 0)
    index = (shape.index_head_dim or 0) if own.compress_ratio < HEAVILY_COMPRESSED else 0
    return (size + index + 4 * -(-index // 128)) / own.compress_ratio


def _packed(elements: int, element: float) -> int:
    if element < 1:  # NVFP4: two per byte, a scale for 16; each rounded up separately
        return -(-elements // 2) + -(-elements // 16)
    return ceil(elements * element)


def state_bytes(subject: LayoutSpec, held: StageWeights) -> int:
    """Return the bytes of a request in a stage's layers without attention: the state, and the convolution's last taps."""
    shape, ranks = subject.shape, subject.layout.attention_tp_size
    state = shape.state_space
    if state is None:
        return 0
    kinds, order = shape.kinds
    counts = Counter(order[held.first_layer : held.first_layer + held.layers])
    total = 0
    for kind, count in counts.items():
        mixer = kinds[kind].mixer
        taps = max(0, (state.kernel or 1) - 1) * dtype_bytes(shape)
        if mixer is Mixer.CONVOLUTION:
            total += count * -(-(shape.hidden_size or 0) // ranks) * taps
        elif mixer.keeps_state:
            heads = -(-state.heads // ranks)
            size = heads * (state.head_dim or 0) * (state.state_size or 0) * state_element_bytes(subject)
            total += count * (size + -(-(state.conv_dim or 0) // ranks) * taps)
    return total


def state_element_bytes(subject: LayoutSpec) -> int:
    """Return the bytes of an element of a state: as the engine config has it, else the model's, else float32."""
    state = subject.shape.state_space
    said = (subject.config.kv_cache.state_dtype or "auto").lower()
    if said == "auto":
        said = ((state.dtype if state is not None else None) or "float32").lower()
    return int(_BYTES.get(_SAME_DTYPE.get(said, said), _STATE_BYTES))
