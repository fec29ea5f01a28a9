# SPDX-License-Identifier: Apache-2.0
"""The shape of a model, read from its ``config.json`` alone: no transformers, no remote code, no weights."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from dynamo_mpi.errors import DataError

_NESTED = ("text_config", "llm_config", "language_config")


@dataclass(frozen=True)
class ModelShape:
    """What the layout rules need to know. What a config doesn't say is None, never guessed.

    Args:
        name: the architecture's class, or the model type.
        attention_heads: query heads, over all ranks.
        kv_heads: key/value heads, over all ranks.
        layers: transformer layers.
        hidden_size: width of the residual stream.
        intermediate_size: width of the dense MLP.
        vocab_size: number of tokens.
        context_length: positions the model was made for.
        latent_attention: multi-head latent attention (DeepSeek): one latent for all heads instead of KV heads.
        bos_token_id: first token of a sequence.
    """

    name: str
    attention_heads: int | None
    kv_heads: int | None
    layers: int | None
    hidden_size: int | None
    intermediate_size: int | None
    vocab_size: int | None
    context_length: int | None
    latent_attention: bool
    bos_token_id: int | None


def parse_model_shape(text: str, path: str) -> ModelShape:
    """Read the text of a ``config.json``.

    Args:
        text: its contents.
        path: where it was found, for messages.

    Raises:
        DataError: it isn't JSON, isn't an object, or a size in it isn't a positive whole number.
    """
    try:
        config = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} is not JSON: {error}", needed="the model's own config.json") from None
    if not isinstance(config, dict):
        raise DataError(f"{path} holds a {type(config).__name__}, not an object", needed="the model's own config.json")
    body = next((config[key] for key in _NESTED if isinstance(config.get(key), dict)), config)
    architectures = config.get("architectures")
    name = (
        architectures[0] if isinstance(architectures, list) and architectures else config.get("model_type", "unknown")
    )
    heads = _size(body, "num_attention_heads", path)
    latent = body.get("kv_lora_rank") is not None
    return ModelShape(
        name=str(name),
        attention_heads=heads,
        kv_heads=None if latent else (_size(body, "num_key_value_heads", path) or heads),
        layers=_size(body, "num_hidden_layers", path),
        hidden_size=_size(body, "hidden_size", path),
        intermediate_size=_size(body, "intermediate_size", path),
        vocab_size=_size(body, "vocab_size", path),
        context_length=_size(body, "max_position_embeddings", path),
        latent_attention=latent,
        bos_token_id=_token(config.get("bos_token_id", body.get("bos_token_id"))),
    )


def _size(body: dict[str, Any], key: str, path: str) -> int | None:
    value = body.get(key)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise DataError(f"{path}: {key} is {value!r}", needed="a positive whole number")
    return value


def _token(value: object) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and value >= 0 else None
