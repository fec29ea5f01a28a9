# SPDX-License-Identifier: Apache-2.0
"""The arguments of an LLM: the keys that dynamo.trtllm passes and tests put into engine configs. Others are refused by name."""

from __future__ import annotations

import enum
from typing import Any

from pydantic import BaseModel, ConfigDict, model_validator

TOKENIZER_ALIASES: dict[str, str] = {}


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", arbitrary_types_allowed=True)


class CapacitySchedulerPolicy(str, enum.Enum):
    """When a request may start."""

    MAX_UTILIZATION = "MAX_UTILIZATION"
    GUARANTEED_NO_EVICT = "GUARANTEED_NO_EVICT"
    STATIC_BATCH = "STATIC_BATCH"


class LoadFormat(enum.Enum):
    """Where weights come from."""

    AUTO = "auto"
    DUMMY = "dummy"


class DynamicBatchConfig(_Strict):
    """Has no effect."""

    enable_batch_size_tuning: bool
    enable_max_num_tokens_tuning: bool
    dynamic_batch_moving_average_window: int


class SchedulerConfig(_Strict):
    """Has no effect."""

    capacity_scheduler_policy: CapacitySchedulerPolicy = CapacitySchedulerPolicy.GUARANTEED_NO_EVICT
    dynamic_batch_config: DynamicBatchConfig | None = None


class KvCacheConfig(_Strict):
    """Only ``tokens_per_block`` has an effect."""

    enable_block_reuse: bool = True
    enable_partial_reuse: bool = True
    max_tokens: int | None = None
    free_gpu_memory_fraction: float | None = 0.9
    host_cache_size: int | None = None
    event_buffer_max_size: int = 0
    dtype: str = "auto"
    tokens_per_block: int = 32


class KvCacheConnectorConfig(_Strict):
    """Refused by `BaseLlmArgs`."""

    connector_module: str
    connector_scheduler_class: str
    connector_worker_class: str


class BaseLlmArgs(_Strict):
    """What an LLM is made from. ``gpus_per_node`` must be given: GPUs that aren't there can't be counted."""

    model: str
    gpus_per_node: int
    tokenizer: str | None = None
    skip_tokenizer_init: bool = False
    trust_remote_code: bool = False
    dtype: str = "auto"
    tensor_parallel_size: int = 1
    pipeline_parallel_size: int = 1
    context_parallel_size: int = 1
    moe_tensor_parallel_size: int | None = None
    moe_expert_parallel_size: int | None = None
    enable_attention_dp: bool = False
    load_format: LoadFormat = LoadFormat.AUTO
    max_batch_size: int | None = 2048
    max_num_tokens: int | None = 8192
    max_seq_len: int | None = None
    max_beam_width: int | None = 1
    kv_cache_config: KvCacheConfig = KvCacheConfig()
    scheduler_config: SchedulerConfig = SchedulerConfig()
    cuda_graph_config: dict[str, Any] | None = None
    cache_transceiver_config: dict[str, Any] | None = None
    disable_overlap_scheduler: bool = False
    enable_chunked_prefill: bool = False
    stream_interval: int = 1
    print_iter_log: bool = False
    enable_iter_perf_stats: bool = False
    return_perf_metrics: bool = False
    guided_decoding_backend: str | None = None
    kv_connector_config: KvCacheConnectorConfig | None = None
    lora_config: dict[str, Any] | None = None
    speculative_config: dict[str, Any] | None = None

    @model_validator(mode="before")
    @classmethod
    def _name_the_format(cls, values: dict[str, Any]) -> dict[str, Any]:
        if isinstance(values.get("load_format"), str):
            values = values | {"load_format": values["load_format"].lower()}
        return values

    def model_post_init(self, _: Any) -> None:
        """Refuse what would need more than the reference engine. NotImplementedError passes through pydantic."""
        without = {
            "enable_attention_dp": (False,),
            "load_format": (LoadFormat.AUTO,),
            "max_beam_width": (None, 1),
            "guided_decoding_backend": (None,),
            "kv_connector_config": (None,),
            "lora_config": (None,),
            "speculative_config": (None,),
        }
        for name, values in without.items():
            if getattr(self, name) not in values:
                raise NotImplementedError(f"the stand-in has no {name}: {getattr(self, name)!r} was asked for")

    @property
    def world_size(self) -> int:
        """Ranks of the model."""
        return self.tensor_parallel_size * self.pipeline_parallel_size * self.context_parallel_size
