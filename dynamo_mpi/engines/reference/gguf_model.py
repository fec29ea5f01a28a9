# SPDX-License-Identifier: Apache-2.0
"""The llama model in a GGUF file: the sizes, the tensors, and the Hugging Face files that Dynamo reads.

Only the conversion reads GGUF, with the ``gguf`` package: see `convert_gguf`.
"""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any, TypeVar

from dynamo_mpi.common.errors import ModelNotFoundError
from dynamo_mpi.engines.reference.shape import LlamaShape

Value = TypeVar("Value", int, float, str)
JsonObject = dict[str, Any]  # Any: the values of JSON documents in formats of other projects

_CONTROL, _USER_DEFINED = 3, 4
_DIGIT_SPLITTING = frozenset({"smollm"})
"""Pre-tokenizers that split single digits before GPT-2's byte-level pattern. Without this, numbers get other tokens."""
# Templates of text models add `content` to strings: content in parts, such as a text and an image, is an error of the template, which
# Dynamo's frontend reports as its own (500). With the texts alone in its place, the request reaches the worker, which refuses the image.
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


class GgufModel:
    """A GGUF file, open for reading.

    Args:
        path: the file.

    Raises:
        ModelNotFoundError: the file can't be read or is not a complete GGUF file, or the ``gguf`` package is missing.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            from gguf import GGUFReader
        except ImportError as error:
            raise ModelNotFoundError(
                f"{path} cannot be converted: {error}",
                expected="the packages gguf and numpy, for the conversion alone",
                fix="pip install 'dynamo-mpi[local]', or convert the model on another machine",
            ) from None
        try:
            reader = GGUFReader(path)
        except OSError as error:
            raise ModelNotFoundError(
                f"{path} cannot be read: {error.strerror}", expected="a readable GGUF file", fix="check the path"
            ) from error
        except Exception as error:  # the package has no exceptions of its own
            raise self.malformed(f"{type(error).__name__}: {error}") from error
        self._fields: dict[str, Any] = reader.fields
        self.tensors: dict[str, Any] = {tensor.name: tensor for tensor in reader.tensors}

    def malformed(self, what: str) -> ModelNotFoundError:
        """Return the error that this file is invalid because of ``what``."""
        return ModelNotFoundError(
            f"{self.path} is not a usable GGUF file: {what}",
            expected="a complete GGUF file of version 2 or 3",
            fix="fetch the file again and compare its size and checksum with the publisher's",
        )

    def __contains__(self, key: object) -> bool:
        return key in self._fields

    def get(self, key: str, kind: type[Value], default: Value | None = None) -> Value:
        """Return a metadata value.

        Raises:
            ModelNotFoundError: it has another type, or is missing and has no default.
        """
        value = self._contents(key) if key in self._fields or default is None else default
        if kind is float and isinstance(value, int) and not isinstance(value, bool):
            value = float(value)
        if not isinstance(value, kind) or isinstance(value, bool):
            raise self.malformed(f"{key} is {value!r:.80}, not of type {kind.__name__}")
        return value

    def items(self, key: str, kind: type[Value]) -> list[Value]:
        """Return a metadata array.

        Raises:
            ModelNotFoundError: it is missing or has another type.
        """
        values = self._contents(key)
        if not isinstance(values, list) or not all(isinstance(value, kind) for value in values):
            raise self.malformed(f"{key} is not a list of type {kind.__name__}")
        return values

    def _contents(self, key: str) -> Any:
        if key not in self._fields:
            raise self.malformed(f"it lacks {key}")
        try:
            return self._fields[key].contents()
        except (IndexError, UnicodeDecodeError) as error:
            raise self.malformed(f"{key} can't be read: {error}") from error


def llama_shape(model: GgufModel) -> LlamaShape:
    """Return the sizes of a llama model.

    Raises:
        ModelNotFoundError: another architecture, an unsupported variant, or contradictory sizes.
    """
    architecture = model.get("general.architecture", str)
    if architecture != "llama":
        raise _unsupported(model, f"its architecture is {architecture!r}")
    if model.get("llama.rope.scaling.type", str, "none") != "none":
        raise _unsupported(model, "it scales its rotary embedding")
    heads = model.get("llama.attention.head_count", int)
    hidden_size = model.get("llama.embedding_length", int)
    if heads < 1 or hidden_size < 1:
        raise model.malformed(f"it has {heads} attention heads and a hidden size of {hidden_size}")
    head_dim = model.get("llama.attention.key_length", int, hidden_size // heads)
    if model.get("llama.rope.dimension_count", int, head_dim) != head_dim:
        raise _unsupported(model, "it rotates only a part of each head")
    if model.get("llama.attention.value_length", int, head_dim) != head_dim:
        raise _unsupported(model, "its keys and values differ in size")
    embedding = model.tensors.get("token_embd.weight")
    shape = LlamaShape(
        num_hidden_layers=model.get("llama.block_count", int),
        hidden_size=hidden_size,
        intermediate_size=model.get("llama.feed_forward_length", int),
        num_attention_heads=heads,
        num_key_value_heads=model.get("llama.attention.head_count_kv", int, heads),
        head_dim=head_dim,
        vocab_size=int(embedding.shape[-1]) if embedding is not None else 0,
        max_position_embeddings=model.get("llama.context_length", int),
        rope_theta=model.get("llama.rope.freq_base", float, 10000.0),
        rms_norm_eps=model.get("llama.attention.layer_norm_rms_epsilon", float),
    )
    for name, value in vars(shape).items():
        if isinstance(value, int) and value < 1:
            raise model.malformed(f"its {name} is {value}")
    if heads % shape.num_key_value_heads or head_dim % 2:
        raise model.malformed(
            f"{heads} attention heads of size {head_dim} and {shape.num_key_value_heads} key/value heads don't fit"
        )
    return shape


def _unsupported(model: GgufModel, what: str) -> ModelNotFoundError:
    return ModelNotFoundError(
        f"the reference engine cannot run {model.path}: {what}",
        expected="a dense llama model with full rotary embeddings",
        fix="use another model, or the trtllm engine",
    )


def hugging_face_files(model: GgufModel) -> dict[str, JsonObject]:
    """Return the content of config.json, generation_config.json, tokenizer.json and tokenizer_config.json.

    Raises:
        ModelNotFoundError: the tokenizer or the architecture is not supported.
    """
    special = {
        name: model.get(f"tokenizer.ggml.{key}_token_id", int)
        for name, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding"))
        if f"tokenizer.ggml.{key}_token_id" in model
    }
    ids = {f"{name}_token_id": special[name] for name in ("bos", "eos", "pad") if name in special}
    tokens = model.items("tokenizer.ggml.tokens", str)
    if not all(0 <= token_id < len(tokens) for token_id in special.values()):
        raise model.malformed(f"it has {len(tokens)} tokens, and a special token beyond them: {special}")
    return {
        "config.json": _config(model) | ids,
        "generation_config.json": dict(ids),
        "tokenizer.json": _tokenizer(model, tokens),
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "clean_up_tokenization_spaces": False,
            "model_max_length": model.get("llama.context_length", int),
            "chat_template": _CONTENT_PARTS + model.get("tokenizer.chat_template", str),
            **{f"{name}_token": tokens[token_id] for name, token_id in special.items()},
        },
    }


def _config(model: GgufModel) -> JsonObject:
    sizes = dict(vars(llama_shape(model)))
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        **sizes,
        "rms_norm_eps": _as_written(sizes["rms_norm_eps"]),
        "tie_word_embeddings": "output.weight" not in model.tensors,
        "attention_bias": False,
        "mlp_bias": False,
        "torch_dtype": "float32",
    }


def _tokenizer(model: GgufModel, tokens: list[str]) -> JsonObject:
    kind, pre_tokenizer = model.get("tokenizer.ggml.model", str), model.get("tokenizer.ggml.pre", str, "")
    if kind != "gpt2" or pre_tokenizer not in _DIGIT_SPLITTING:
        raise ModelNotFoundError(
            f"{model.path} has the tokenizer {kind}/{pre_tokenizer}, which cannot be converted here",
            expected=f"tokenizer gpt2/{' or '.join(sorted(_DIGIT_SPLITTING))}",
            fix="put the publisher's config.json and tokenizer files into the output folder and convert with --weights-only",
        )
    types = model.items("tokenizer.ggml.token_type", int)
    if len(tokens) != len(types) or len(set(tokens)) != len(tokens):
        raise model.malformed(f"its {len(tokens)} tokens are not unique or don't match their {len(types)} types")
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
            "merges": [merge.split(" ", 1) for merge in model.items("tokenizer.ggml.merges", str)],
        },
    }


def _as_written(value: float) -> float:
    """Return the decimal number that was rounded to float32 in the file: 1e-05 for 9.999999747378752e-06."""
    for digits in range(1, 10):
        short = float(f"{value:.{digits}g}")
        if struct.pack("<f", short) == struct.pack("<f", value):
            return short
    return value
