# SPDX-License-Identifier: Apache-2.0
"""The Hugging Face configuration and tokenizer files of a model, made from its GGUF alone. Pure."""

from __future__ import annotations

import struct
from typing import Any

from dynamo_mpi.engines.reference.gguf_file import GgufFile
from dynamo_mpi.engines.reference.shape import llama_shape
from dynamo_mpi.errors import ModelError

_CONTROL, _USER_DEFINED = 3, 4
_DIGIT_SPLITTING = frozenset({"smollm"})
"""Pre-tokenizers that split off single digits before GPT-2's byte-level pattern. Without it, numbers get other tokens."""
# Templates of text models add `content` to strings: content in parts, such as a text and an image, is an error of the template, which
# Dynamo's frontend tells as its own (500). With the texts alone in its place, the request gets to the worker, and that says what it can't do.
_CONTENT_PARTS = """\
{%- set plain = namespace(messages=[]) -%}
{%- for message in messages -%}
{%- if message['content'] is iterable and message['content'] is not string and message['content'] is not mapping -%}
{%- set joined = namespace(text='') -%}
{%- for part in message['content'] if part['type'] == 'text' -%}
{%- set joined.text = joined.text + part['text'] -%}
{%- endfor -%}
{%- set plain.messages = plain.messages + [dict(message, content=joined.text)] -%}
{%- else -%}
{%- set plain.messages = plain.messages + [message] -%}
{%- endif -%}
{%- endfor -%}
{%- set messages = plain.messages -%}
"""

JsonObject = dict[str, Any]  # Any: the values of JSON documents of other people's formats


def hugging_face_files(file: GgufFile) -> dict[str, JsonObject]:
    """Return the contents of config.json, generation_config.json, tokenizer.json and tokenizer_config.json.

    Raises:
        ModelError: the file's tokenizer or architecture is not one that this module knows.
    """
    special = {
        name: file.integer(f"tokenizer.ggml.{key}_token_id")
        for name, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding"))
        if f"tokenizer.ggml.{key}_token_id" in file
    }
    ids = {f"{name}_token_id": special[name] for name in ("bos", "eos", "pad") if name in special}
    return {
        "config.json": _config(file) | ids,
        "generation_config.json": dict(ids),
        "tokenizer.json": _tokenizer(file),
        "tokenizer_config.json": _tokenizer_config(file, special),
    }


def _config(file: GgufFile) -> JsonObject:
    shape = llama_shape(file)
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "hidden_size": shape.hidden_size,
        "intermediate_size": shape.intermediate_size,
        "num_hidden_layers": shape.num_hidden_layers,
        "num_attention_heads": shape.num_attention_heads,
        "num_key_value_heads": shape.num_key_value_heads,
        "head_dim": shape.head_dim,
        "vocab_size": shape.vocab_size,
        "max_position_embeddings": shape.max_position_embeddings,
        "rope_theta": shape.rope_theta,
        "rms_norm_eps": _as_written(shape.rms_norm_eps),
        "tie_word_embeddings": "output.weight" not in file.tensors,
        "attention_bias": False,
        "mlp_bias": False,
        "torch_dtype": "float32",
    }


def _tokenizer(file: GgufFile) -> JsonObject:
    kind, pre_tokenizer = file.text("tokenizer.ggml.model"), file.text("tokenizer.ggml.pre", "")
    if kind != "gpt2" or pre_tokenizer not in _DIGIT_SPLITTING:
        raise ModelError(
            f"{file.path} has the tokenizer {kind}/{pre_tokenizer}, which cannot be converted here",
            needed=f"tokenizer gpt2/{' or '.join(sorted(_DIGIT_SPLITTING))}",
            fix="put the publisher's config.json and tokenizer files beside the GGUF and give that folder as the model",
        )
    tokens, types = file.texts("tokenizer.ggml.tokens"), file.integers("tokenizer.ggml.token_type")
    if len(tokens) != len(types) or len(set(tokens)) != len(tokens):
        raise file.malformed(f"its {len(tokens)} tokens are not unique or don't match their {len(types)} types")
    added = [
        {
            "id": token_id,
            "content": token,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": token_type == _CONTROL,
        }
        for token_id, (token, token_type) in enumerate(zip(tokens, types, strict=True))
        if token_type in (_CONTROL, _USER_DEFINED)
    ]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    digits = {"type": "Digits", "individual_digits": True}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [digits, byte_level]},
        "post_processor": None,
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": {token: token_id for token_id, token in enumerate(tokens)},
            "merges": [merge.split(" ", 1) for merge in file.texts("tokenizer.ggml.merges")],
        },
    }


def _tokenizer_config(file: GgufFile, special: dict[str, int]) -> JsonObject:
    tokens = file.texts("tokenizer.ggml.tokens")
    if not all(0 <= token_id < len(tokens) for token_id in special.values()):
        raise file.malformed(f"it has {len(tokens)} tokens, and a special token beyond them: {special}")
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "model_max_length": file.integer("llama.context_length"),
        "chat_template": _CONTENT_PARTS + file.text("tokenizer.chat_template"),
        **{f"{name}_token": tokens[token_id] for name, token_id in special.items()},
    }


def _as_written(value: float) -> float:
    """Return the decimal number that was rounded to float32 in the file: 1e-05 for 9.999999747378752e-06."""
    for digits in range(1, 10):
        short = float(f"{value:.{digits}g}")
        if struct.pack("<f", short) == struct.pack("<f", value):
            return short
    return value
