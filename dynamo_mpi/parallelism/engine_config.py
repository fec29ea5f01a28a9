# SPDX-License-Identifier: Apache-2.0
"""The engine config: TensorRT-LLM's YAML as its users write it, with its names."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dynamo_mpi.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Mapping


@dataclass(frozen=True)
class EngineConfig:
    """The keys of an engine config that decide about layout and capacity. None: left to the engine.

    Args:
        tp_size: ``tensor_parallel_size``.
        pp_size: ``pipeline_parallel_size``.
        cp_size: ``context_parallel_size``.
        enable_attention_dp: attention runs data-parallel over the tp ranks, so heads aren't split (C1).
        max_batch_size: requests in one step.
        max_num_tokens: tokens in one step.
        max_seq_len: prompt and output tokens of one request.
        tokens_per_block: ``kv_cache_config.tokens_per_block``.
    """

    tp_size: int = 1
    pp_size: int = 1
    cp_size: int = 1
    enable_attention_dp: bool = False
    max_batch_size: int | None = None
    max_num_tokens: int | None = None
    max_seq_len: int | None = None
    tokens_per_block: int | None = None

    @property
    def world_size(self) -> int:
        """Ranks that the layout needs (A1)."""
        return self.tp_size * self.pp_size * self.cp_size


_SIZES = {
    "tensor_parallel_size": "tp_size",
    "pipeline_parallel_size": "pp_size",
    "context_parallel_size": "cp_size",
    "max_batch_size": "max_batch_size",
    "max_num_tokens": "max_num_tokens",
    "max_seq_len": "max_seq_len",
}


def parse_engine_config(text: str, path: str, flags: Mapping[str, int] | None = None) -> EngineConfig:
    """Read the text of an engine YAML, and lay ``flags`` over it.

    Args:
        text: its contents; empty for no config.
        path: where it was found, for messages.
        flags: sizes given on the command line, by their YAML key.

    Raises:
        DataError: it isn't YAML, isn't a mapping, or one of the keys read here has an impossible value.
    """
    # not at the top: ranks other than 0 import this module's neighbours, never a YAML reader
    import yaml

    try:
        loaded = yaml.safe_load(text)
    # PyYAML lets through what int() and date() say of impossible numbers and dates
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise DataError(f"{path} is not YAML: {' '.join(str(error).split())}", needed="TensorRT-LLM's YAML") from None
    if loaded is None:
        loaded = {}
    if not isinstance(loaded, dict):
        raise DataError(f"{path} holds a {type(loaded).__name__}, not a mapping", needed="`key: value` lines") from None
    values: dict[str, Any] = {}
    for key, name in _SIZES.items():
        if (value := loaded.get(key)) is not None:
            values[name] = _size(value, key, path)
    for key, flag in (flags or {}).items():
        values[_SIZES[key]] = flag
    attention_dp = loaded.get("enable_attention_dp", False)
    if not isinstance(attention_dp, bool):
        raise DataError(f"{path}: enable_attention_dp is {attention_dp!r}", needed="true or false")
    kv_cache = loaded.get("kv_cache_config") or {}
    if not isinstance(kv_cache, dict):
        raise DataError(f"{path}: kv_cache_config is {kv_cache!r}", needed="a mapping")
    if (block := kv_cache.get("tokens_per_block")) is not None:
        values["tokens_per_block"] = _size(block, "kv_cache_config.tokens_per_block", path)
    return EngineConfig(enable_attention_dp=attention_dp, **values)


def _size(value: object, key: str, path: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise DataError(f"{path}: {key} is {value!r}", needed="a positive whole number")
    return value
