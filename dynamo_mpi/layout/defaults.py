# SPDX-License-Identifier: Apache-2.0
"""H4: TensorRT-LLM's defaults for keys that an engine config does not set (``BaseLlmArgs``, ``KvCacheConfig``)."""

from __future__ import annotations

MAX_BATCH_SIZE = 2048
MAX_NUM_TOKENS = 8192
TOKENS_PER_BLOCK = 32
FREE_GPU_MEMORY_FRACTION = 0.9
