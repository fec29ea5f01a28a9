# SPDX-License-Identifier: Apache-2.0
"""A GGUF file of a llama with random weights, small enough to be converted in milliseconds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGMLQuantizationType, GGUFWriter
from gguf.quants import quantize

from dynamo_mpi.engines.reference.shape import LlamaShape

SHAPE = LlamaShape(
    num_hidden_layers=3,
    hidden_size=32,
    intermediate_size=64,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    vocab_size=40,
    max_position_embeddings=64,
    rope_theta=10000.0,
    rms_norm_eps=1e-5,
)


def tensor_shapes() -> dict[str, tuple[int, ...]]:
    """Return the tensors of the file, ``[out, in]``."""
    hidden, inner, queries, keys = 32, 64, 32, 16
    layer = {
        "attn_norm": (hidden,), "attn_q": (queries, hidden), "attn_k": (keys, hidden), "attn_v": (keys, hidden),
        "attn_output": (hidden, queries), "ffn_norm": (hidden,), "ffn_gate": (inner, hidden), "ffn_up": (inner, hidden),
        "ffn_down": (hidden, inner),
    }  # fmt: skip
    layers = {
        f"blk.{index}.{name}.weight": size for index in range(SHAPE.num_hidden_layers) for name, size in layer.items()
    }
    return {"token_embd.weight": (40, hidden), **layers, "output_norm.weight": (hidden,), "output.weight": (40, hidden)}


def write_gguf(
    path: Path,
    *,
    without: str = "",
    shapes: dict[str, tuple[int, ...]] | None = None,
    architecture: str = "llama",
    values: dict[str, Any] | None = None,
    pre_tokenizer: str = "smollm",
    seed: int = 0,
) -> Path:
    """Write the file: matrices as Q8_0, vectors as float32.

    Args:
        path: of the file.
        without: a tensor to leave out.
        shapes: of tensors that are to differ, or of more.
        architecture: of the model.
        values: unsigned integers of the metadata that are to differ, or more.
        pre_tokenizer: as the tokenizer names it.
        seed: of the weights.
    """
    writer = GGUFWriter(path, architecture)
    sizes = {
        "block_count": 3, "context_length": 64, "embedding_length": 32, "feed_forward_length": 64,
        "attention.head_count": 4, "attention.head_count_kv": 2, "rope.dimension_count": 8,
    }  # fmt: skip
    for key, value in ({f"llama.{name}": size for name, size in sizes.items()} | (values or {})).items():
        writer.add_uint32(key, value)
    writer.add_float32("llama.attention.layer_norm_rms_epsilon", 1e-5)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre_tokenizer)
    writer.add_token_list([f"t{number}" for number in range(40)])
    writer.add_token_types([3] + [1] * 39)
    writer.add_token_merges(["t 1"])
    writer.add_eos_token_id(0)
    writer.add_chat_template("{{ messages }}")
    generator = np.random.default_rng(seed)
    for name, size in (tensor_shapes() | (shapes or {})).items():
        numbers = generator.standard_normal(size, np.float32)
        if name == without:
            continue
        if len(size) == 1:
            writer.add_tensor(name, numbers)
        else:
            kind = GGMLQuantizationType.Q8_0
            writer.add_tensor(name, quantize(numbers, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
