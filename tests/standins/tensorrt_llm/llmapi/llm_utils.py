# SPDX-License-Identifier: Apache-2.0
"""Engine configs over keyword arguments."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from .llm_args import KvCacheConfig


def update_llm_args_with_extra_options(llm_args: dict[str, Any], extra_llm_api_options: str) -> dict[str, Any]:
    """Return the arguments with a YAML file's over them; ``kv_cache_config`` is merged key by key."""
    if not extra_llm_api_options:
        return llm_args
    extra = yaml.safe_load(Path(extra_llm_api_options).read_text(encoding="utf-8")) or {}
    if not isinstance(extra, dict):
        raise ValueError(f"{extra_llm_api_options} holds no mapping")
    given = llm_args.get("kv_cache_config")
    if "kv_cache_config" in extra and given is not None:
        base = given if isinstance(given, dict) else given.model_dump(exclude_unset=True)
        extra["kv_cache_config"] = KvCacheConfig(**(base | (extra["kv_cache_config"] or {})))
    return llm_args | extra
