# SPDX-License-Identifier: Apache-2.0
"""Section F: pipeline stages, context parallelism, and combinations with known bugs in a release."""

from __future__ import annotations

from dynamo_mpi.common.light_typing import TYPE_CHECKING
from dynamo_mpi.layout.finding import error, info, warning
from dynamo_mpi.layout.format import counted, listed
from dynamo_mpi.layout.gpus import DATACENTRE_BLACKWELL, GPUS
from dynamo_mpi.layout.kv_cache import tokens_per_block
from dynamo_mpi.layout.quantisation import NVFP4

if TYPE_CHECKING:
    from collections.abc import Iterator

    from dynamo_mpi.layout.finding import Finding
    from dynamo_mpi.layout.layout import LayoutSpec

# DeepSeek-V3, R1 and V3-Lite
_HELIX_MODELS = ("DeepseekV3ForCausalLM",)


def check_layers(subject: LayoutSpec) -> Iterator[Finding]:
    """F3: there are at least as many layers as pipeline stages (``modeling_utils.DecoderModel.__pp_init__``)."""
    count, stages = subject.shape.num_layers, subject.layout.pp_size
    if count is not None and count < stages:
        yield error(
            "F3",
            f"pp_size = {stages} is more than the model's {counted(count, 'layer')}",
            found=f"{subject.shape.name}: num_hidden_layers {count}, pp_size {stages}",
            expected="num_hidden_layers >= pp_size",
            fix=f"set pipeline_parallel_size to {count} or less",
        )


def check_partition(subject: LayoutSpec) -> Iterator[Finding]:
    """F2: a partition has an entry for every stage and contains every layer (``mapping.py: pp_layers``)."""
    partition, stages, count = subject.config.pp_partition, subject.layout.pp_size, subject.shape.num_layers
    if partition is None:
        return
    if len(partition) != stages:
        yield error(
            "F2",
            f"pp_partition has {len(partition)} entries for {stages} pipeline stages",
            found=f"len(pp_partition) {len(partition)}, pp_size {stages}",
            expected="one number of layers per stage",
            fix=f"write {stages} numbers, or leave pp_partition out",
        )
    elif count is not None and sum(partition) != count:
        yield error(
            "F2",
            f"pp_partition hands out {sum(partition)} of {count} layers",
            found=f"sum(pp_partition) {sum(partition)}, num_hidden_layers {count}",
            expected="sum(pp_partition) == num_hidden_layers",
            fix=f"correct the numbers, or leave pp_partition out: stages then hold {_stages(subject)} layers",
        )


def _stages(subject: LayoutSpec) -> str:
    sizes = subject.layout.stage_sizes(subject.shape.num_layers or 0)
    return str(sizes[0]) if sizes[0] == sizes[-1] else f"{sizes[0]} or {sizes[-1]}"


def check_encoder_decoder(subject: LayoutSpec) -> Iterator[Finding]:
    """F5: pipeline stages have no effect for encoder-decoder models (``__pp_init__``)."""
    if subject.shape.encoder_decoder and subject.layout.pp_size > 1:
        yield error(
            "F5",
            "an encoder-decoder model has no pipeline parallelism",
            found=f"{subject.shape.name}: pp_size {subject.layout.pp_size}",
            expected="pp_size 1",
            fix="set pipeline_parallel_size: 1",
        )


def check_speculation(subject: LayoutSpec) -> Iterator[Finding]:
    """F6: layers for speculation are on the last stage."""
    speculative, stages = subject.config.speculative, subject.layout.pp_size
    if speculative is not None and stages > 1:
        yield info(
            "F6",
            "the layers for speculative decoding are all on the last pipeline stage, which needs the memory",
            found=f"speculative_config {speculative.decoding_type or ''}, pp_size {stages}".strip(),
            fix="give the last stage fewer layers with pp_partition if it is short of memory",
        )


def check_compressed_cache(subject: LayoutSpec) -> Iterator[Finding]:
    """F7: DeepSeek-V4's cache needs ``pp = cp = 1`` (main, cache sizing)."""
    layout = subject.layout
    if subject.shape.output_groups is not None and (layout.pp_size > 1 or layout.cp_size > 1):
        yield error(
            "F7",
            "DeepSeek-V4's cache has neither pipeline stages nor context parallelism",
            found=f"pp_size {layout.pp_size}, cp_size {layout.cp_size}",
            expected="pp_size 1 and cp_size 1",
            fix="use tensor_parallel_size with enable_attention_dp and moe_expert_parallel_size for all ranks",
        )


def check_helix(subject: LayoutSpec) -> Iterator[Finding]:
    """F9: HELIX is for decode workers, and its blocks are the KV cache's (executor creation; ``CacheFormatter``)."""
    config = subject.config
    if not subject.layout.is_helix:
        return
    if subject.role != "decode":
        yield error(
            "F9",
            f"HELIX context parallelism is for decode workers, this one is {_article(subject.role)} worker",
            found=f"role {subject.role}, cp_size {subject.layout.cp_size}, cp_type HELIX",
            expected="role decode, with a prefill worker whose cp_size is 1",
            fix="set context_parallel_size: 1, or run it with --role decode beside a prefill worker",
        )
    cache = tokens_per_block(subject)
    if config.cp_tokens_per_block is not None and config.cp_tokens_per_block != cache:
        yield error(
            "F9",
            "context parallelism and KV cache have blocks of different sizes",
            found=f"cp_config.tokens_per_block {config.cp_tokens_per_block}, the KV cache {cache}",
            expected="the same number of tokens",
            fix=f"set cp_config.tokens_per_block: {cache}",
        )


def is_documented_helix(subject: LayoutSpec) -> bool:
    """F13: whether the engine's own page names HELIX for this model, for the kind of GPU if it is known, and for this speculation."""
    return _is_named_for_helix(subject) and not _has_mtp(subject)


def _is_named_for_helix(subject: LayoutSpec) -> bool:
    gpu = GPUS.get(subject.cluster.gpu or "")
    return subject.shape.name in _HELIX_MODELS and (gpu is None or gpu.sm in DATACENTRE_BLACKWELL)


def _has_mtp(subject: LayoutSpec) -> bool:
    speculative = subject.config.speculative
    return speculative is not None and (speculative.decoding_type or "").upper() == "MTP"


def check_helix_support(subject: LayoutSpec) -> Iterator[Finding]:
    """F13: HELIX is documented for the latent attention of DeepSeek-V3 on Blackwell, and not together with MTP
    (``docs/source/features/helix.md``; pull request 16003 is open)."""
    if not subject.layout.is_helix:
        return
    on = subject.cluster.gpu
    if not _is_named_for_helix(subject):
        yield warning(
            "F13",
            f"HELIX isn't documented for {subject.shape.name}" + (f" on {on}" if on else ""),
            found=f"cp_size {subject.layout.cp_size}, cp_type HELIX; {subject.shape.name}" + (f"; {on}" if on else ""),
            expected=f"{', '.join(_HELIX_MODELS)} on SM {listed(sorted(DATACENTRE_BLACKWELL))}",
            fix="set context_parallel_size: 1, or try it before you rely on it",
        )
    if _has_mtp(subject):
        yield warning(
            "F13",
            "HELIX isn't documented together with multi-token prediction (MTP)",
            found=f"cp_size {subject.layout.cp_size}, cp_type HELIX; speculative_config.decoding_type MTP",
            expected="Eagle3 in one model, or no speculation",
            fix="leave speculative_config out, or set context_parallel_size: 1",
        )


def _article(role: str) -> str:
    return f"an {role}regated" if role == "agg" else f"a {role}"


def check_known_bugs(subject: LayoutSpec) -> Iterator[Finding]:
    """F11: known issues in the release notes ("Known Issues", ``docs/source/release-notes.md``)."""
    shape, layout, cluster = subject.shape, subject.layout, subject.cluster
    if not subject.older_than(1, 1):
        return
    algo = shape.quantisation.algo if shape.quantisation is not None else ""
    if layout.pp_size > 1 and shape.name.startswith("Llama") and (algo.startswith("FP8") or algo == NVFP4):
        yield warning(
            "F11",
            f"TensorRT-LLM {subject.version} has a known fault with Llama, pipeline stages and {algo}",
            found=f"{shape.name}, pp_size {layout.pp_size}, {algo}",
            expected="TensorRT-LLM 1.1 or newer",
            fix="set TRTLLM_LLAMA_EAGER_FUSION_DISABLED=1",
        )
    if cluster.nodes > 1 and cluster.gpus_per_node == 1:
        yield warning(
            "F11",
            f"TensorRT-LLM {subject.version} is known to fail on several nodes with one GPU each",
            found=str(cluster),
            expected="TensorRT-LLM 1.1 or newer, or more GPUs per node",
            fix="take a newer release, or nodes with more GPUs",
        )
    if subject.role != "agg" and layout.pp_size > 1 and subject.config.kv_cache.enable_block_reuse:
        yield warning(
            "F11",
            f"TensorRT-LLM {subject.version} can hang with disaggregation, pipeline stages and block reuse",
            found=f"role {subject.role}, pp_size {layout.pp_size}, kv_cache_config.enable_block_reuse true",
            expected="TensorRT-LLM 1.1 or newer",
            fix="set kv_cache_config: {enable_block_reuse: false}",
        )


RULES = (
    check_layers,
    check_partition,
    check_encoder_decoder,
    check_speculation,
    check_compressed_cache,
    check_helix,
    check_helix_support,
    check_known_bugs,
)
