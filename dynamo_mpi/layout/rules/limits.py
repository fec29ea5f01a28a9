# SPDX-License-Identifier: Apache-2.0
"""Section H: limits and combinations of keys that TensorRT-LLM's validators reject, or accept and then ignore."""

from __future__ import annotations

from dynamo_mpi.common.light_typing import TYPE_CHECKING
from dynamo_mpi.layout.engine_config import (
    DEFAULT_FREE_GPU_MEMORY_FRACTION,
    DEFAULT_MAX_BATCH_SIZE,
    DEFAULT_MAX_NUM_TOKENS,
)
from dynamo_mpi.layout.engine_keys import engine_keys
from dynamo_mpi.layout.finding import error, info, warning
from dynamo_mpi.layout.format import counted
from dynamo_mpi.layout.trtllm_version import parse_trtllm_version

if TYPE_CHECKING:
    from collections.abc import Iterator

    from dynamo_mpi.layout.finding import Finding
    from dynamo_mpi.layout.layout import LayoutSpec

_NEEDS_A_MODEL = ("eagle", "eagle3", "draft_target", "medusa")
_NEEDS_A_LENGTH = ("eagle", "eagle3", "ngram", "draft_target", "sa")
_DRAFTS = (*_NEEDS_A_LENGTH, "mtp", "pard", "dflash", "dspark")


def check_cuda_graphs(subject: LayoutSpec) -> Iterator[Finding]:
    """H1: the largest captured batch is the configured one (``CudaGraphConfig``); larger ones than ``max_batch_size`` are dropped
    (``model_engine._filter_cuda_graph_batch_sizes``)."""
    config = subject.config
    sizes, largest = config.cuda_graph_batch_sizes, config.cuda_graph_max_batch_size
    if not sizes:
        return
    if largest and subject.older_than(1, 2) and sorted(sizes) != _generated_sizes(largest, config.cuda_graph_padding):
        yield error(
            "H1",
            "cuda_graph_config has both batch_sizes and max_batch_size, which releases up to 1.1 refuse",
            found=f"cuda_graph_config.max_batch_size {largest}, batch_sizes up to {max(sizes)}",
            expected="one of them",
            fix="leave cuda_graph_config.max_batch_size out",
        )
    elif largest and largest != max(sizes):
        yield error(
            "H1",
            "cuda_graph_config names two different largest batches",
            found=f"cuda_graph_config.max_batch_size {largest}, batch_sizes up to {max(sizes)}",
            expected="max_batch_size == max(batch_sizes), or one of them alone",
            fix="leave cuda_graph_config.max_batch_size out",
        )
    limit = config.max_batch_size or DEFAULT_MAX_BATCH_SIZE
    if dropped := [size for size in sizes if size > limit]:
        yield info(
            "H1",
            f"CUDA graphs for batches above max_batch_size are dropped, not captured: {', '.join(map(str, dropped[:5]))}",
            found=f"cuda_graph_config.batch_sizes up to {max(sizes)}, max_batch_size {limit}",
            fix=f"remove sizes above {limit}, or raise max_batch_size",
        )


def _generated_sizes(largest: int, padding: bool) -> list[int]:
    """Return the engine's own sizes for a largest batch (``CudaGraphConfig._generate_cuda_graph_batch_sizes``)."""
    sizes = [1, 2, 4, *range(8, 129, 8)] if padding else [*range(1, 33), 64, 128]
    sizes += [2**power for power in range(8, max(largest - 1, 1).bit_length())]
    return sorted({*(size for size in sizes if size <= largest), largest})


def check_batch_and_tokens(subject: LayoutSpec) -> Iterator[Finding]:
    """H2: a step holds at least one token of each of its requests (``BaseLlmArgs``; the engine warns too)."""
    batch = subject.config.max_batch_size or DEFAULT_MAX_BATCH_SIZE
    tokens = subject.config.max_num_tokens or DEFAULT_MAX_NUM_TOKENS
    if batch > tokens:
        say = info if subject.config.max_batch_size is None else warning
        yield say(
            "H2",
            f"a step of {counted(tokens, 'token')} can't hold {batch} requests",
            found=f"max_batch_size {batch}, max_num_tokens {tokens}",
            expected="max_batch_size <= max_num_tokens",
            fix=f"set max_batch_size to {tokens} or less, or raise max_num_tokens",
        )


def check_prompt_length(subject: LayoutSpec) -> Iterator[Finding]:
    """H3: without chunked prefill a prompt must fit into one step (``llm.py: _check_arguments``); decode workers get none."""
    config = subject.config
    if config.enable_chunked_prefill or subject.role == "decode":
        return
    tokens = config.max_num_tokens or DEFAULT_MAX_NUM_TOKENS
    length = config.max_seq_len or subject.shape.context_length
    if length is None or length <= tokens:
        return
    say = info if config.max_seq_len is None else warning
    yield say(
        "H3",
        f"prompts above {tokens} tokens will be refused, though max_seq_len is {length}",
        found=f"max_num_tokens {tokens}, max_seq_len {length}"
        + (" (the model's)" if config.max_seq_len is None else "")
        + ", enable_chunked_prefill false",
        expected="max_num_tokens >= max_seq_len, or chunked prefill",
        fix="set enable_chunked_prefill: true",
    )


def check_memory_fraction(subject: LayoutSpec) -> Iterator[Finding]:
    """H5: a fraction (``KvCacheConfig``; the C++ side wants less than 1)."""
    fraction = subject.config.kv_cache.free_gpu_memory_fraction
    if fraction is None or 0 <= fraction < 1:
        return
    yield error(
        "H5",
        f"free_gpu_memory_fraction {fraction:g} is no fraction of the free memory",
        found=f"kv_cache_config.free_gpu_memory_fraction {fraction:g}",
        expected="at least 0, less than 1",
        fix=f"set kv_cache_config: {{free_gpu_memory_fraction: {DEFAULT_FREE_GPU_MEMORY_FRACTION}}}",
    )


def check_windows(subject: LayoutSpec) -> Iterator[Finding]:
    """H6: attention windows are positive (``KvCacheConfig``)."""
    windows = subject.config.kv_cache.max_attention_window
    if windows is not None and (not windows or min(windows) < 1):
        yield error(
            "H6",
            "max_attention_window holds no usable windows",
            found=f"kv_cache_config.max_attention_window {list(windows)[:8]}",
            expected="a list of positive numbers of tokens",
            fix="leave max_attention_window out, or write one number per layer (they are repeated)",
        )


def check_sequence_length(subject: LayoutSpec) -> Iterator[Finding]:
    """H7: the model's positions are the ceiling; the engine clips with a warning (``py_executor_creator``)."""
    asked, context = subject.config.max_seq_len, subject.shape.context_length
    if asked is not None and context is not None and asked > context:
        yield warning(
            "H7",
            f"max_seq_len {asked} is beyond the {context} positions of the model",
            found=f"max_seq_len {asked}, max_position_embeddings {context}",
            expected=f"max_seq_len of at most {context}",
            fix=f"set max_seq_len: {context}",
        )


def check_attention_backend(subject: LayoutSpec) -> Iterator[Finding]:
    """H8: some attention backends change settings of the cache without an error (``py_executor_creator``)."""
    backend = (subject.config.attn_backend or "").upper()
    said = subject.config.kv_cache.tokens_per_block
    if backend == "FLASHMLA" and said not in (None, 64):
        yield warning(
            "H8",
            "FlashMLA sets tokens_per_block to 64, whatever the config says",
            found=f"attn_backend {backend}, kv_cache_config.tokens_per_block {said}",
            expected="tokens_per_block 64 with FlashMLA",
            fix="set kv_cache_config: {tokens_per_block: 64}",
        )
    if backend == "VANILLA" and subject.role != "agg":
        yield warning(
            "H8",
            "the VANILLA attention backend sets tokens_per_block to max_num_tokens: the other role has to do the same",
            found=f"attn_backend {backend}, role {subject.role}",
            expected="blocks of one size in both roles",
            fix="use attn_backend: TRTLLM",
        )
    if backend == "FLASHINFER" and subject.config.kv_cache.enable_block_reuse:
        yield info("H8", "the FLASHINFER attention backend switches block reuse off", found=f"attn_backend {backend}")


def check_connector(subject: LayoutSpec) -> Iterator[Finding]:
    """H10: a KV connector needs the scheduler that never evicts (``py_executor_creator``)."""
    scheduler = subject.config.keys.get("scheduler_config")
    policy = scheduler.get("capacity_scheduler_policy") if isinstance(scheduler, dict) else None
    if subject.config.keys.get("kv_connector_config") and policy not in (None, "GUARANTEED_NO_EVICT"):
        yield error(
            "H10",
            "a KV connector needs the scheduler that never evicts",
            found=f"kv_connector_config, scheduler_config.capacity_scheduler_policy {str(policy)[:60]}",
            expected="GUARANTEED_NO_EVICT",
            fix="set scheduler_config: {capacity_scheduler_policy: GUARANTEED_NO_EVICT}",
        )


def check_speculation(subject: LayoutSpec) -> Iterator[Finding]:
    """H12: speculation needs something to draft, and with what (``llm_args``, the speculative configs)."""
    speculative = subject.config.speculative
    if speculative is None:
        return
    kind = (speculative.decoding_type or "").lower()
    length = speculative.max_draft_len
    if length is None and kind in _NEEDS_A_LENGTH and not subject.older_than(1, 2):
        yield (error if subject.version is not None else warning)(
            "H12",
            f"speculative decoding of type {speculative.decoding_type} needs max_draft_len from TensorRT-LLM 1.2 on",
            found="no speculative_config.max_draft_len",
            expected="at least 1",
            fix="set speculative_config.max_draft_len to the tokens to draft",
        )
    if length is not None and length < 1 and kind in _DRAFTS:
        yield error(
            "H12",
            f"max_draft_len {length} drafts nothing",
            found=f"speculative_config.max_draft_len {length}",
            expected="at least 1",
            fix="set it to the tokens to draft, or leave speculative_config out",
        )
    if kind in _NEEDS_A_MODEL and speculative.model is None:
        yield error(
            "H12",
            f"speculative decoding of type {speculative.decoding_type} needs a draft model",
            found=f"speculative_config.decoding_type {speculative.decoding_type}, no speculative_model",
            expected="speculative_config.speculative_model",
            fix="name the folder of the draft model",
        )
    if kind == "mtp" and subject.shape.nextn_layers == 0:
        yield warning(
            "H12",
            "the config asks for multi-token prediction, and the model's config.json names no layers for it",
            found=f"speculative_config.decoding_type {speculative.decoding_type}; {subject.shape.name}: none",
            expected="num_nextn_predict_layers of at least 1 in config.json",
            fix="leave speculative_config out, or use a checkpoint with MTP layers",
        )


def check_orchestrator(subject: LayoutSpec) -> Iterator[Finding]:
    """H15: the orchestrator is MPI, which is the default and has no name. ``rpc`` runs over MPI too, but a rank other than 0 returns from it
    as soon as its engine is built, and looks like one that has failed (``executor/rpc_worker.py``)."""
    orchestrator = subject.config.orchestrator
    if orchestrator is None or (orchestrator == "rpc" and subject.cluster.world_size == 1):
        return
    problem = f"orchestrator_type {orchestrator} is not for a world of MPI ranks"
    if orchestrator == "rpc":
        problem = "orchestrator_type rpc is for a worker of one rank: other ranks leave it when they have loaded"
    elif orchestrator != "ray":
        problem = f"orchestrator_type {orchestrator} is not a value of the engine's, whose default is MPI"
    yield error(
        "H15",
        problem,
        found=f"orchestrator_type {orchestrator}, {subject.cluster.world_size} ranks",
        expected="no orchestrator_type",
        fix="leave orchestrator_type and all ray_* keys out",
    )


def check_version(subject: LayoutSpec) -> Iterator[Finding]:
    """H18: the version of TensorRT-LLM is one that this project has read; a newer one may have other keys, values and limits."""
    newest = engine_keys().newest
    if subject.engine != "trtllm" or subject.version is None or subject.version <= parse_trtllm_version(newest):
        return
    yield warning(
        "H18",
        f"TensorRT-LLM {subject.version} isn't known here: it is judged as {newest}",
        found=str(subject.version),
        expected=f"{newest} or older",
        fix="look whether a newer dynamo_mpi knows it, or correct the version",
    )


RULES = (
    check_version,
    check_cuda_graphs,
    check_batch_and_tokens,
    check_prompt_length,
    check_memory_fraction,
    check_windows,
    check_sequence_length,
    check_attention_backend,
    check_connector,
    check_speculation,
    check_orchestrator,
)
