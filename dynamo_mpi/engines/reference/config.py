# SPDX-License-Identifier: Apache-2.0
"""The settings of a reference engine, read from the keys of a TensorRT-LLM engine YAML."""

from __future__ import annotations

from pathlib import Path

from dynamo_mpi.common.errors import ConfigFileError, LayoutError
from dynamo_mpi.common.frozen import dataclass

DEFAULT_CONTEXT = 2048
DEFAULT_KV_BLOCK = 32


@dataclass(frozen=True)
class ReferenceConfig:
    """The settings of one engine.

    Args:
        model_dir: a directory that `convert_gguf` has written.
        tp_size: ranks that share a stage.
        max_batch_size: number of sequences that run at once; each has one KV-cache slot.
        max_num_tokens: tokens of one step over all sequences; longer prompts enter in chunks.
        max_seq_len: prompt and output tokens of one request; by default the model's context, but at most 2048.
        kv_block_size: tokens of a KV-cache block, as reported.
        pp_size: stages of layers; times ``tp_size`` it is the engine's world.
        cp_size: must be 1.
        serves_kv: whether decode workers may fetch KV from this engine, which then belongs to a prefill worker.
        kv_network: interface, network or address at which KV is served; None for the host's own address.
        kv_keep_seconds: how long KV waits to be fetched.
        kv_pull_seconds: how long fetching the KV of one request may take.

    Raises:
        ConfigFileError: a value is invalid.
        LayoutError: context parallelism is requested.
    """

    model_dir: Path
    tp_size: int
    max_batch_size: int = 8
    max_num_tokens: int = 512
    max_seq_len: int | None = None
    kv_block_size: int = DEFAULT_KV_BLOCK
    pp_size: int = 1
    cp_size: int = 1
    serves_kv: bool = False
    kv_network: str | None = None
    kv_keep_seconds: float = 60.0
    kv_pull_seconds: float = 10.0

    def __post_init__(self) -> None:
        for name in ("tp_size", "pp_size", "max_batch_size", "max_num_tokens", "max_seq_len", "kv_block_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigFileError(
                    f"{name} is {value}", expected=f"{name} of at least 1", fix="correct the engine config"
                )
        if self.max_num_tokens < self.max_batch_size:
            raise ConfigFileError(
                f"max_num_tokens {self.max_num_tokens} is smaller than max_batch_size {self.max_batch_size}",
                expected="room for one token of every running sequence in each step",
                fix=f"set max_num_tokens to {self.max_batch_size} or more in the engine config",
            )
        if self.cp_size != 1:
            raise LayoutError(
                f"context_parallel_size is {self.cp_size}",
                expected="context_parallel_size: 1, as the reference engine knows tensor and pipeline parallelism only",
                fix="use tensor_parallel_size and pipeline_parallel_size for all ranks",
            )

    def context_length(self, model_context: int) -> int:
        """Return the largest number of tokens of a request.

        Raises:
            ConfigFileError: ``max_seq_len`` exceeds the model's context.
        """
        if self.max_seq_len is None:
            return min(model_context, DEFAULT_CONTEXT)
        if self.max_seq_len > model_context:
            raise ConfigFileError(
                f"max_seq_len is {self.max_seq_len}, the model's context {model_context} tokens",
                expected=f"max_seq_len of at most {model_context}",
                fix="lower max_seq_len in the engine config",
            )
        return self.max_seq_len
