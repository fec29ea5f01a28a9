# SPDX-License-Identifier: Apache-2.0
"""The public names of the LLM API that dynamo.trtllm imports from here."""

from __future__ import annotations

from tensorrt_llm.disaggregated_params import DisaggregatedParams

from .llm_args import CapacitySchedulerPolicy, DynamicBatchConfig, KvCacheConfig, SchedulerConfig

__all__ = ["CapacitySchedulerPolicy", "DisaggregatedParams", "DynamicBatchConfig", "KvCacheConfig", "SchedulerConfig"]
