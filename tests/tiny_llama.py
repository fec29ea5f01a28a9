# SPDX-License-Identifier: Apache-2.0
"""A llama of one layer, or a few, with random weights, for tests of what an engine does around the model's arithmetic.

It has the tokenizer, the vocabulary and the context length of the default model, so that the same prompts fit.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from gguf import GGUFReader, GGUFValueType, GGUFWriter

HIDDEN, INTERMEDIATE, HEADS, KV_HEADS = 96, 192, 6, 3


def write_tiny_gguf(
    default: Path, path: Path, *, layers: int = 1, heads: int = HEADS, kv_heads: int = KV_HEADS
) -> None:
    """Write the model.

    Args:
        default: GGUF file of the default model; everything but the sizes and the weights comes from it.
        path: the new file.
        layers: its layers.
        heads: its attention heads.
        kv_heads: its KV heads.
    """
    sizes = {
        "llama.block_count": layers,
        "llama.embedding_length": HIDDEN,
        "llama.feed_forward_length": INTERMEDIATE,
        "llama.attention.head_count": heads,
        "llama.attention.head_count_kv": kv_heads,
        "llama.rope.dimension_count": HIDDEN // heads,
    }
    reader = GGUFReader(default)
    writer = GGUFWriter(path, "llama")
    for field in reader.fields.values():
        if field.name.startswith("GGUF.") or field.name == "general.architecture":
            continue
        kind = field.types[0]
        sub_type = field.types[-1] if kind == GGUFValueType.ARRAY else None
        writer.add_key_value(field.name, sizes.get(field.name, field.contents()), kind, sub_type=sub_type)
    vocabulary = len(reader.fields["tokenizer.ggml.tokens"].data)
    random = np.random.default_rng(1)

    def add(name: str, *shape: int) -> None:
        writer.add_tensor(f"{name}.weight", random.standard_normal(shape, dtype=np.float32))

    def add_norm(name: str) -> None:
        writer.add_tensor(f"{name}.weight", np.ones(HIDDEN, np.float32))

    add("token_embd", vocabulary, HIDDEN)
    add_norm("output_norm")
    for layer in range(layers):
        for name in ("attn_norm", "ffn_norm"):
            add_norm(f"blk.{layer}.{name}")
        for name in ("attn_q", "attn_output"):
            add(f"blk.{layer}.{name}", HIDDEN, HIDDEN)
        for name in ("attn_k", "attn_v"):
            add(f"blk.{layer}.{name}", kv_heads * (HIDDEN // heads), HIDDEN)
        add(f"blk.{layer}.ffn_gate", INTERMEDIATE, HIDDEN)
        add(f"blk.{layer}.ffn_up", INTERMEDIATE, HIDDEN)
        add(f"blk.{layer}.ffn_down", HIDDEN, INTERMEDIATE)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
