# SPDX-License-Identifier: Apache-2.0
"""The keys of TensorRT-LLM's engine YAML: what each version takes, and what became of those it no longer takes.

The engine refuses a file with a single key that it doesn't know, and between 0.20 and 1.3 it renamed or moved dozens of them.
Data only; names as in ``llmapi/llm_args.py`` of 0.21, 1.0, 1.2.0rc, 1.3.0rc (twice) and the branch that leads to 1.3.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

# the newest version that the lists below are known to cover
NEWEST = "1.3.0rc29"

# older ones can't be used with the bootstrap
OLDEST = "1.0"

# Sections by their dotted path, "" being the top level. ``name@1.2``: not in 1.1, and in 1.2 or one of its candidates;
# ``name<1.2``: in 1.1, and not in 1.2. Unmarked names may still be missing from some version: a mark is set only where both
# sides of it were seen. A key that isn't a section here is free in what it holds.
SECTIONS: dict[str, str] = {
    "": """
        model tokenizer tokenizer_mode skip_tokenizer_init trust_remote_code revision tokenizer_revision dtype backend
        tensor_parallel_size pipeline_parallel_size context_parallel_size gpus_per_node
        moe_tensor_parallel_size moe_expert_parallel_size moe_cluster_parallel_size enable_attention_dp cp_config
        load_format checkpoint_format checkpoint_loader enable_lora lora_config peft_cache_config quant_config
        kv_cache_config kv_connector_config connector_config enable_chunked_prefill guided_decoding_backend
        batched_logits_processor iter_stats_max_iterations request_stats_max_iterations scheduler_config
        cache_transceiver_config speculative_config decoding_config max_batch_size max_input_len max_seq_len
        max_beam_width max_num_tokens gather_generation_logits num_postprocess_workers postprocess_tokenizer_dir
        reasoning_parser mpi_session _mpi_session garbage_collection_gen0_threshold cuda_graph_config
        disable_overlap_scheduler moe_config attn_backend enable_iter_perf_stats enable_iter_req_stats print_iter_log
        torch_compile_config enable_autotuner enable_layerwise_nvtx_marker enable_min_latency stream_interval
        force_dynamic_quantization allreduce_strategy build_config enable_mixed_sampler enable_trtllm_sampler
        fail_fast_on_attention_window_too_large<1.2

        enable_lm_head_tp_in_adp@1.1 sparse_attention_config@1.1 return_perf_metrics@1.1 perf_metrics_max_requests@1.1
        orchestrator_type@1.1 attention_dp_config@1.1 sampler_type@1.1 batch_wait_timeout_ms@1.1
        batch_wait_timeout_iters@1.1 batch_wait_max_tokens_ratio@1.1 mm_encoder_only@1.1 ray_worker_extension_cls@1.1

        custom_tokenizer@1.2 model_kwargs@1.2 pp_partition@1.2 otlp_traces_endpoint@1.2 env_overrides@1.2
        nvfp4_gemm_config@1.2 sampler_force_async_worker@1.2 ray_placement_config@1.2 enable_sleep@1.2 max_stats_len@1.2
        use_cute_dsl_blockscaling_mm@1.2 use_cute_dsl_blockscaling_bmm@1.2 layer_wise_benchmarks_config@1.2
        disable_flashinfer_sampling@1.2<1.3

        hf_revision@1.3 post_processor_hook@1.3 kv_cache_compression_config@1.3 num_serve_frontends@1.3
        perf_metrics_output_dir@1.3 prometheus_metrics_config@1.3 enable_energy_metrics@1.3 telemetry_config@1.3
        generation_config@1.3 encoder_cuda_graph_config@1.3 enable_encoder_decoder_mixed_cuda_graph@1.3
        multimodal_config@1.3 video_pruning_rate@1.3 dwdp_config@1.3 encoder_max_batch_size@1.3
        encoder_max_num_tokens@1.3 enable_mla_skip_correction@1.3 mla_skip_correction_threshold@1.3
        enable_in_graph_sampling@1.3 enable_speculative_beam_history_d2h@1.3 enable_early_first_token_response@1.3
        enable_low_latency_host_dispatch@1.3 prefill_cuda_graph_backend@1.3 prefill_capture_num_tokens@1.3
        use_fine_grained_sync@1.3 checkpoint_io_policy@1.3 mx_config@1.3 gms_config@1.3 disable_mm_encoder@1.3
        encode_only@1.3 ray_worker_nsight_options@1.3 sleep_config@1.3 reorder_policy_config@1.3
        enable_resource_governor@1.3 use_cute_dsl_bf16_bmm@1.3 use_cute_dsl_bf16_gemm@1.3
    """,
    "kv_cache_config": """
        enable_block_reuse max_tokens max_attention_window sink_token_length free_gpu_memory_fraction host_cache_size
        onboard_blocks cross_kv_cache_fraction secondary_offload_min_priority event_buffer_max_size enable_partial_reuse
        copy_on_partial_reuse use_uvm dtype tokens_per_block max_gpu_total_bytes@1.1 mamba_ssm_cache_dtype@1.1
        attention_dp_events_gather_period_ms@1.1 use_kv_cache_manager_v2@1.2 max_util_for_resume@1.2
        mamba_ssm_stochastic_rounding mamba_ssm_philox_rounds mamba_state_cache_interval mamba_state_config@1.3
        kv_events_config@1.3 disk_cache_size@1.3 disk_cache_path@1.3 disk_prefetch_num_reqs@1.3
        iteration_stats_interval@1.3 enable_swa_scratch_reuse@1.3 kv_cache_event_hash_algo@1.3
        enable_kv_pool_rebalance@1.3 kv_pool_rebalance_min_sampled_kv_caches@1.3 kv_pool_rebalance_cooldown_secs@1.3
        kv_pool_rebalance_target_ratio_update_interval@1.3 kv_pool_rebalance_ratio_threshold@1.3
        kv_pool_rebalance_moving_average_decay@1.3 kv_pool_rebalance_check_interval@1.3 fp8_context_mla_kv_len_cap@1.3
        pool_ratio@1.3 avg_seq_len@1.3 block_reuse_config@1.3 block_reuse_policy@1.3
    """,
    "kv_cache_config.block_reuse_config": "policy max_num_turns block_reuse_policy",
    "kv_cache_config.kv_events_config": """
        enable_kv_cache_events publisher endpoint replay_endpoint buffer_steps hwm max_queue_size topic
    """,
    "kv_cache_config.mamba_state_config": """
        periodic_snapshot_interval additional_snapshot_offsets_from_start additional_snapshot_offsets_from_end
        enable_branch_snapshot
    """,
    "kv_cache_compression_config": """
        algorithm quant scale_checkpoint_path eviction_mode normalize_scores budget beta calibration_path
    """,
    "kv_connector_config": """
        connector_module connector_scheduler_class connector_worker_class connector@1.3 server_url@1.3
    """,
    "connector_config": "connector_module connector_scheduler_class connector_worker_class",
    "moe_config": """
        backend max_num_tokens load_balancer disable_finalize_fusion@1.1 use_low_precision_moe_combine@1.1
    """,
    "moe_config.load_balancer": "num_slots initial_global_assignments layer_updates_per_iter",
    "cuda_graph_config": """
        batch_sizes max_batch_size enable_padding mode@1.3 num_tokens@1.3 max_num_token@1.3 seq_lens@1.3 max_seq_len@1.3
    """,
    "encoder_cuda_graph_config": """
        batch_sizes max_batch_size enable_padding mode num_tokens max_num_token seq_lens max_seq_len
    """,
    "cache_transceiver_config": """
        backend max_tokens_in_buffer kv_transfer_timeout_ms@1.1 kv_transfer_sender_future_timeout_ms@1.2
        transceiver_runtime@1.2 kv_transfer_poll_interval_ms kv_cache_bounce_size_mb@1.3 enable_pipelined_transfer@1.3
    """,
    "scheduler_config": """
        capacity_scheduler_policy context_chunking_policy dynamic_batch_config waiting_queue_policy@1.2
        use_python_scheduler@1.3 enable_prefix_aware_scheduling@1.3
    """,
    "scheduler_config.dynamic_batch_config": """
        enable_batch_size_tuning enable_max_num_tokens_tuning dynamic_batch_moving_average_window
    """,
    # one class per `decoding_type`; these are the keys of all of them
    "speculative_config": """
        decoding_type max_draft_len speculative_model_dir speculative_model@1.2 max_total_draft_tokens@1.1
        max_concurrency@1.1 load_format@1.1 draft_len_schedule@1.2 acceptance_window@1.1 acceptance_length_threshold@1.1
        acceptance_rate_window_size@1.3 acceptance_rate_threshold@1.3 allow_advanced_sampling@1.2
        use_rejection_sampling@1.3 advanced_sampling_mode@1.3 enable_penalty@1.3 attention_backend@1.3
        medusa_choices num_medusa_heads eagle_choices greedy_sampling posterior_threshold use_dynamic_tree
        dynamic_tree_max_topK num_eagle_layers max_non_leaves_per_layer eagle3_one_model eagle3_layers_to_capture@1.1
        eagle3_model_arch@1.2 output_directory@1.1 write_interval@1.1 file_prefix@1.1 drafter resource_manager
        max_matching_ngram_size is_keep_all is_use_oldest is_public_pool is_auto_heuristic num_nextn_predict_layers
        num_nextn_predict_layers_from_model_config use_relaxed_acceptance_for_thinking relaxed_topk relaxed_delta
        use_mtp_vanilla mtp_eagle_one_model@1.1 BEGIN_THINKING_PHASE_TOKEN END_THINKING_PHASE_TOKEN
        begin_thinking_phase_token@1.2 end_thinking_phase_token@1.2 max_window_size max_ngram_size
        max_verification_set_size mask_token_id@1.2 enable_global_pool@1.3 global_pool_size@1.3 sa_config@1.3
        use_sa_spec@1.3 sa_spec_threshold@1.3 target_layer_ids@1.3 block_size@1.3 markov_rank@1.3 markov_head_type@1.3
    """,
    "speculative_config.sa_config": "threshold enable_global_pool",
    # one class per `algorithm`
    "sparse_attention_config": """
        algorithm window_size kernel_size topr topk prompt_budget page_size index_n_heads index_head_dim index_topk
        indexer_max_chunk_size kt_cache_dtype@1.2 seq_len_threshold@1.2 skip_indexer_for_short_seqs@1.2
        threshold_scale_factor@1.2 target_sparsity@1.3 use_cute_dsl_topk@1.3 use_cute_dsl_paged_mqa_logits@1.3
        q_split_threshold@1.3 indexer_rope_interleave@1.3 enable_heuristic_topk@1.3 use_self_sampling_topk@1.3
        use_gvr_emission@1.3 indexer_k_dtype@1.3 index_share_for_mtp_iteration@1.3 compress_ratios@1.3
        sparse_num_index_heads@1.3 sparse_index_dim@1.3 sparse_block_size@1.3 sparse_topk_blocks@1.3
        sparse_init_blocks@1.3 sparse_local_blocks@1.3 sparse_score_type@1.3 sparse_disable_index_value@1.3
        indexer_kv_dtype@1.3 num_attention_heads@1.3 num_key_value_heads@1.3 implementation@1.3
        fuse_qkv_index_projection@1.3
    """,
    "attention_dp_config": """
        enable_balance timeout_iters batching_wait_iters enable_kv_cache_aware_routing@1.3
        kv_cache_routing_load_balance_weight@1.3 kv_cache_routing_match_rate_threshold@1.3
        kv_cache_routing_fair_share_multiplier@1.3 kv_cache_routing_cold_start_warmup@1.3
        kv_cache_routing_account_for_in_transfer@1.3 kv_cache_routing_conversation_affinity@1.3
        kv_cache_routing_max_sessions@1.3 kv_cache_routing_new_conv_placement@1.3
    """,
    "cp_config": "cp_type tokens_per_block use_nccl_for_alltoall fifo_version cp_anchor_size block_size",
    "torch_compile_config": """
        enable_fullgraph enable_inductor enable_piecewise_cuda_graph enable_userbuffers max_num_streams
        capture_num_tokens@1.1
    """,
    "lora_config": """
        lora_dir lora_ckpt_source max_lora_rank lora_target_modules trtllm_modules_to_hf_modules max_loras max_cpu_loras
        swap_gate_up_proj swap_gate_up_proj_lora_b_weight cuda_graph_specialize_lora overlap_lora_and_base
    """,
    "peft_cache_config": """
        num_host_module_layer num_device_module_layer optimal_adapter_size max_adapter_size num_put_workers
        num_ensure_workers num_copy_streams max_pages_per_block_host max_pages_per_block_device device_cache_percent
        host_cache_size lora_prefetch_dir
    """,
    "quant_config": """
        quant_algo kv_cache_quant_algo group_size smoothquant_val clamp_val use_meta_recipe has_zero_point
        pre_quant_scale exclude_modules mamba_ssm_cache_dtype mamba_ssm_stochastic_rounding mamba_ssm_philox_rounds
    """,
    "nvfp4_gemm_config": "allowed_backends",
    "layer_wise_benchmarks_config": "calibration_mode calibration_file_path calibration_layer_indices",
    "ray_placement_config": "defer_workers_init placement_groups placement_bundle_indices per_worker_gpu_share",
    "dwdp_config": "dwdp_size num_groups num_experts_per_worker num_prefetch_experts contention_opt",
    "mx_config": "server_url server_query_timeout_s preshard_strategy",
    "gms_config": "socket_path mode tag",
    "multimodal_config": """
        encoder_cuda_graph encoder_side_stream_max_ahead encoder_cache_max_bytes encoder_scheduling_policy
        video_pruning_rate
    """,
    "prometheus_metrics_config": """
        e2e_request_latency_buckets time_to_first_token_buckets time_per_output_token_buckets request_queue_time_buckets
        request_prefill_time_buckets request_decode_time_buckets request_inference_time_buckets
    """,
    "reorder_policy_config": "policy_name policy_args",
    "reorder_policy_config.policy_args": "agent_percentage agent_types agent_inflight_seq_num",
    "sleep_config": "restore_modes",
}

# free-form mappings until that version
FREE_BEFORE = {"cp_config": (1, 3)}

# with these backends the top level has keys of its own
OTHER_BACKENDS = ("_autodeploy", "tensorrt", "trt")


@dataclass(frozen=True)
class Key:
    """A key and the versions that take it, as far as known.

    Args:
        name: the key.
        since: the release that first took it; None where not established.
        until: the release that no longer took it; None while there is none.
    """

    name: str
    since: tuple[int, int] | None = None
    until: tuple[int, int] | None = None


@cache
def keys_of(section: str) -> dict[str, Key]:
    """Return the keys of a section, by name; empty for what isn't one."""
    return {key.name: key for key in map(_key, SECTIONS.get(section, "").split())}


@dataclass(frozen=True)
class Renamed:
    """A key that was renamed, moved or dropped, or that never was one.

    Args:
        old: its dotted path.
        new: dotted path of what took its place; empty where nothing did.
        refused: the version from which the engine refuses the old one; empty while it doesn't; ``"0"`` if it never took it.
        since: the version from which there is something to say about it.
        inverted: the new key means the opposite.
        values: what becomes of certain values; others stay.
        hoisted: its contents move to the top level.
        hint: what to write instead, where that isn't a matter of copying a value.
    """

    old: str
    new: str = ""
    refused: str = ""
    since: str = "0.0"
    inverted: bool = False
    values: tuple[tuple[object, object], ...] = ()
    hoisted: bool = False
    hint: str = ""


@dataclass(frozen=True)
class RemovedValue:
    """A value that a key no longer takes.

    Args:
        path: dotted path of the key.
        values: the values.
        new: what to write for each; empty: drop the key.
        refused: the version from which the engine refuses it.
        hint: more about what to choose instead.
    """

    path: str
    values: tuple[str, ...]
    new: tuple[str, ...]
    refused: str
    hint: str = ""


_SWITCH: tuple[tuple[object, object], ...] = ((True, {}), (False, None))
_SAMPLER: tuple[tuple[object, object], ...] = ((True, "TRTLLMSampler"), (False, "TorchSampler"))
_PIECEWISE: tuple[tuple[object, object], ...] = ((True, "piecewise"), (False, "disabled"))

# several rows for one key: the last whose `since` has come
RENAMED: tuple[Renamed, ...] = (
    # one flat level since 0.21
    Renamed("pytorch_backend_config", refused="0.21", hoisted=True),
    Renamed("enable_overlap_scheduler", "disable_overlap_scheduler", "0.21", inverted=True),
    Renamed("use_cuda_graph", "cuda_graph_config", "1.0", values=_SWITCH),
    Renamed("cuda_graph_batch_sizes", "cuda_graph_config.batch_sizes", "1.0"),
    Renamed("cuda_graph_max_batch_size", "cuda_graph_config.max_batch_size", "1.0"),
    Renamed("cuda_graph_padding_enabled", "cuda_graph_config.enable_padding", "1.0"),
    Renamed("cuda_graph_config.padding_enabled", "cuda_graph_config.enable_padding", "1.0"),
    Renamed("cuda_graph_config.cuda_graph_batch_sizes", "cuda_graph_config.batch_sizes", "0"),
    Renamed("cuda_graph_config.cuda_graph_max_batch_size", "cuda_graph_config.max_batch_size", "0"),
    Renamed("cuda_graph_config.cuda_graph_padding_enabled", "cuda_graph_config.enable_padding", "0"),
    Renamed("cuda_graph_config.use_cuda_graph", refused="0", hint="`cuda_graph_config: null` turns graphs off"),
    Renamed("torch_compile_enabled", "torch_compile_config", "1.0", values=_SWITCH),
    Renamed("torch_compile_fullgraph", "torch_compile_config.enable_fullgraph", "1.0"),
    Renamed("torch_compile_inductor_enabled", "torch_compile_config.enable_inductor", "1.0"),
    Renamed("torch_compile_piecewise_cuda_graph", "torch_compile_config.enable_piecewise_cuda_graph", "1.0"),
    Renamed("torch_compile_enable_userbuffers", "torch_compile_config.enable_userbuffers", "1.0"),
    Renamed("torch_compile_max_num_streams", "torch_compile_config.max_num_streams", "1.0"),
    Renamed("kv_cache_dtype", "kv_cache_config.dtype", "1.0"),
    Renamed("kv_cache_free_gpu_mem_fraction", "kv_cache_config.free_gpu_memory_fraction", "0.21"),
    Renamed("kv_cache_free_gpu_memory_fraction", "kv_cache_config.free_gpu_memory_fraction", "0.21"),
    Renamed("moe_backend", "moe_config.backend", "1.0"),
    Renamed("moe_max_num_tokens", "moe_config.max_num_tokens", "1.0"),
    Renamed("moe_load_balancer", "moe_config.load_balancer", "1.0"),
    Renamed("autotuner_enabled", "enable_autotuner", "1.0"),
    Renamed("mixed_sampler", "enable_mixed_sampler", "1.0"),
    Renamed("mixed_sampler", refused="1.0", since="1.1", hint="the sampler mixes strategies by itself"),
    Renamed("enable_mixed_sampler", refused="1.1", since="1.0", hint="the sampler mixes strategies by itself"),
    Renamed("enable_trtllm_sampler", "sampler_type", "1.1", values=_SAMPLER),
    Renamed("enable_trtllm_sampler", refused="1.1", since="1.3.0rc29", hint="there is one sampler, TorchSampler"),
    Renamed("sampler_type", since="1.3.0rc29", hint="there is one sampler, TorchSampler"),
    Renamed("max_lora_rank", "lora_config.max_lora_rank", "1.0"),
    Renamed("max_loras", "lora_config.max_loras", "1.0"),
    Renamed("max_cpu_loras", "lora_config.max_cpu_loras", "1.0"),
    Renamed("connector_config", "kv_connector_config", "1.1", since="1.0"),
    Renamed("cache_transceiver_config.max_num_tokens", "cache_transceiver_config.max_tokens_in_buffer", "1.0"),
    # the TensorRT engine backend's, until it went
    Renamed("build_config", refused="1.3.0rc25", since="1.0", hoisted=True),
    *(
        Renamed(name, refused="1.0", hint="it belonged to the TensorRT engine backend")
        for name in (
            "auto_parallel",
            "auto_parallel_world_size",
            "batching_type",
            "calib_config",
            "embedding_parallel_mode",
            "enable_build_cache",
            "enable_prompt_adapter",
            "enable_tqdm",
            "extended_runtime_perf_knob_config",
            "fast_build",
            "max_prompt_adapter_token",
            "normalize_log_probs",
            "workspace",
        )
    ),
    # during the candidates of 1.3; where the exact one isn't known, a later one
    Renamed("enable_sleep", "sleep_config", "1.3.0rc12", since="1.2", values=_SWITCH),
    Renamed("kv_cache_config.onboard_blocks", refused="1.3.0rc14", since="1.2", hint="`host_cache_size` decides"),
    Renamed("video_pruning_rate", "multimodal_config.video_pruning_rate", "1.3.0rc22", since="1.3.0rc1"),
    Renamed(
        "kv_cache_config.block_reuse_policy",
        "kv_cache_config.block_reuse_config.policy",
        "1.3.0rc25",
        since="1.3.0rc1",
    ),
    Renamed(
        "kv_cache_config.block_reuse_config.block_reuse_policy",
        "kv_cache_config.block_reuse_config.policy",
        "1.3.0rc25",
        since="1.3.0rc1",
    ),
    Renamed(
        "speculative_config.acceptance_window",
        "speculative_config.acceptance_rate_window_size",
        "1.3.0rc29",
        since="1.3.0rc1",
    ),
    Renamed(
        "speculative_config.acceptance_length_threshold",
        refused="1.3.0rc29",
        since="1.3.0rc1",
        hint="`acceptance_rate_threshold` takes its place, and is a rate from 0 to 1",
    ),
    # still taken
    Renamed(
        "torch_compile_config.enable_piecewise_cuda_graph",
        "prefill_cuda_graph_backend",
        since="1.3.0rc25",
        values=_PIECEWISE,
    ),
    Renamed("torch_compile_config.capture_num_tokens", "prefill_capture_num_tokens", since="1.3.0rc25"),
    Renamed(
        "kv_cache_config.mamba_state_cache_interval",
        "kv_cache_config.mamba_state_config.periodic_snapshot_interval",
        since="1.3.0rc25",
    ),
    Renamed("kv_cache_config.sink_token_length", since="1.3.0rc1", hint="it has no effect"),
    Renamed("speculative_config.speculative_model_dir", "speculative_config.speculative_model", since="1.3.0rc1"),
    Renamed("speculative_config.num_nextn_predict_layers", "speculative_config.max_draft_len", since="1.3.0rc20"),
    Renamed("speculative_config.allow_advanced_sampling", since="1.3.0rc20", hint="it has no effect"),
    Renamed("moe_cluster_parallel_size", since="1.3.0rc20", hint="tensor and expert parallel size say it all"),
    Renamed("perf_metrics_max_requests", since="1.3.0rc25", hint="it has no effect"),
    Renamed("decoding_config", since="1.0", hint="`speculative_config` takes its place"),
    # names from command lines and from other engines
    Renamed("tp_size", "tensor_parallel_size", "0"),
    Renamed("tp", "tensor_parallel_size", "0"),
    Renamed("pp_size", "pipeline_parallel_size", "0"),
    Renamed("pp", "pipeline_parallel_size", "0"),
    Renamed("cp_size", "context_parallel_size", "0"),
    Renamed("cp", "context_parallel_size", "0"),
    Renamed("ep_size", "moe_expert_parallel_size", "0"),
    Renamed("ep", "moe_expert_parallel_size", "0"),
    Renamed("expert_parallel_size", "moe_expert_parallel_size", "0"),
    Renamed("moe_ep_size", "moe_expert_parallel_size", "0"),
    Renamed("moe_tp_size", "moe_tensor_parallel_size", "0"),
    Renamed("cluster_size", "moe_cluster_parallel_size", "0"),
    Renamed("model_path", "model", "0"),
    Renamed("max_model_len", "max_seq_len", "0"),
    Renamed("kv_block_size", "kv_cache_config.tokens_per_block", "0"),
    Renamed("kv_cache_config.kv_cache_dtype", "kv_cache_config.dtype", "0"),
    Renamed("enable_kv_cache_reuse", "kv_cache_config.enable_block_reuse", "0"),
    Renamed("enable_chunked_context", "enable_chunked_prefill", "0"),
    Renamed("attention_backend", "attn_backend", "0"),
    Renamed("disable_cuda_graph", "cuda_graph_config", "0", values=((True, None), (False, {}))),
    Renamed("speculative_config.pytorch_weights_path", "speculative_config.speculative_model_dir", "1.0"),
    Renamed("speculative_config.pytorch_weights_path", "speculative_config.speculative_model", "1.0", since="1.2"),
)

REMOVED_VALUES: tuple[RemovedValue, ...] = (
    RemovedValue("backend", ("tensorrt", "trt"), ("pytorch", "pytorch"), "1.3.0rc25"),
    RemovedValue(
        "moe_config.backend",
        ("WIDEEP", "wideep"),
        ("AUTO", "AUTO"),
        "1.3.0rc25",
        "or DEEPGEMM for FP8 block scales on SM100, CUTLASS for them on SM90, TRTLLM or CUTEDSL for NVFP4",
    ),
    RemovedValue(
        "cache_transceiver_config.backend",
        ("default", "ucx", "nixl", "mooncake", "mpi"),
        ("DEFAULT", "UCX", "NIXL", "MOONCAKE", "MPI"),
        "1.1",
    ),
    RemovedValue("sampler_type", ("TRTLLMSampler",), (), "1.3.0rc29", "there is one sampler, TorchSampler"),
)


@cache
def renamed_by_path() -> dict[str, tuple[Renamed, ...]]:
    """Return the rows of `RENAMED` by the path of the old key, in their order."""
    rows: dict[str, tuple[Renamed, ...]] = {}
    for row in RENAMED:
        rows[row.old] = (*rows.get(row.old, ()), row)
    return rows


@cache
def removed_values() -> dict[str, RemovedValue]:
    """Return `REMOVED_VALUES` by path."""
    return {row.path: row for row in REMOVED_VALUES}


def _key(written: str) -> Key:
    rest, _, until = written.partition("<")
    name, _, since = rest.partition("@")
    return Key(name, _minor(since), _minor(until))


def _minor(text: str) -> tuple[int, int] | None:
    if not text:
        return None
    major, minor = text.split(".")
    return int(major), int(minor)
