# SPDX-License-Identifier: Apache-2.0
"""The sizes of a llama model, and what of it each rank holds."""

from __future__ import annotations

from dataclasses import dataclass

from dynamo_mpi.engines.reference.gguf_file import GgufFile
from dynamo_mpi.errors import LayoutError, ModelError
from dynamo_mpi.parallelism.heads import legal_tp_sizes


@dataclass(frozen=True)
class LlamaShape:
    """Sizes of one model, named as in its Hugging Face configuration where they are in it."""

    num_hidden_layers: int
    hidden_size: int
    intermediate_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int
    max_position_embeddings: int
    rope_theta: float
    rms_norm_eps: float


@dataclass(frozen=True)
class Share:
    """What one rank holds. All ranges are contiguous and in global numbers.

    Args:
        query_heads: whole heads of the attention.
        kv_heads: the key/value heads those need; ranks share one where ``tp_size`` exceeds their number.
        intermediate: columns of the feed-forward layer.
        vocabulary: token ids.
    """

    query_heads: range
    kv_heads: range
    intermediate: range
    vocabulary: range


def llama_shape(file: GgufFile) -> LlamaShape:
    """Read the shape from a GGUF file's metadata.

    Raises:
        ModelError: another architecture, a variant this engine doesn't compute, or sizes that contradict.
    """
    architecture = file.text("general.architecture")
    if architecture != "llama":
        raise _unsupported(file, f"its architecture is {architecture!r}")
    if "llama.rope.scaling.type" in file and file.text("llama.rope.scaling.type") != "none":
        raise _unsupported(file, "it scales its rotary embedding")
    heads = file.integer("llama.attention.head_count")
    hidden_size = file.integer("llama.embedding_length")
    if heads < 1 or hidden_size < 1:
        raise file.malformed(f"it has {heads} attention heads and a hidden size of {hidden_size}")
    head_dim = file.integer("llama.attention.key_length", hidden_size // heads)
    if file.integer("llama.rope.dimension_count", head_dim) != head_dim:
        raise _unsupported(file, "it rotates only a part of each head")
    if file.integer("llama.attention.value_length", head_dim) != head_dim:
        raise _unsupported(file, "its keys and values differ in size")
    embedding = file.tensors.get("token_embd.weight")
    shape = LlamaShape(
        num_hidden_layers=file.integer("llama.block_count"),
        hidden_size=hidden_size,
        intermediate_size=file.integer("llama.feed_forward_length"),
        num_attention_heads=heads,
        num_key_value_heads=file.integer("llama.attention.head_count_kv", heads),
        head_dim=head_dim,
        vocab_size=embedding.shape[0] if embedding and embedding.shape else 0,
        max_position_embeddings=file.integer("llama.context_length"),
        rope_theta=file.number("llama.rope.freq_base", 10000.0),
        rms_norm_eps=file.number("llama.attention.layer_norm_rms_epsilon"),
    )
    sizes = {name: value for name, value in vars(shape).items() if isinstance(value, int)}
    for name, value in sizes.items():
        if value < 1:
            raise file.malformed(f"its {name} is {value}")
    if heads % shape.num_key_value_heads or head_dim % 2:
        raise file.malformed(
            f"{heads} attention heads of size {head_dim} and {shape.num_key_value_heads} key/value heads don't fit"
        )
    return shape


def share_of(shape: LlamaShape, rank: int, tp_size: int) -> Share:
    """Return what ``rank`` of ``tp_size`` holds.

    Raises:
        LayoutError: the heads cannot be shared out like this.
    """
    heads, kv_heads = shape.num_attention_heads, shape.num_key_value_heads
    legal = legal_tp_sizes(heads, kv_heads)
    if tp_size not in legal:
        raise LayoutError(
            f"tensor_parallel_size {tp_size} does not fit {heads} attention heads and {kv_heads} key/value heads",
            needed=f"tensor_parallel_size one of {', '.join(map(str, legal))}",
            fix="set tensor_parallel_size in the engine config and start as many ranks",
        )
    query_heads = part_of(heads, tp_size, rank)
    group = heads // kv_heads
    return Share(
        query_heads=query_heads,
        kv_heads=range(query_heads.start // group, (query_heads.stop - 1) // group + 1),
        intermediate=part_of(shape.intermediate_size, tp_size, rank),
        vocabulary=part_of(shape.vocab_size, tp_size, rank),
    )


def part_of(total: int, parts: int, index: int) -> range:
    """Return the ``index``-th of ``parts`` contiguous ranges of ``total`` items; the first ones hold the remainder."""
    quotient, remainder = divmod(total, parts)
    start = index * quotient + min(index, remainder)
    return range(start, start + quotient + (1 if index < remainder else 0))


def _unsupported(file: GgufFile, what: str) -> ModelError:
    return ModelError(
        f"the reference engine cannot run {file.path}: {what}",
        needed="a dense llama model with full rotary embeddings",
        fix="use another model, or the trtllm engine",
    )
