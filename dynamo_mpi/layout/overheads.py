# SPDX-License-Identifier: Apache-2.0
"""A rank's memory besides the language model and its KV cache (section J).

Encoders, a draft model and LoRA adapters are counted. An encoder is whole on every rank (unless ``TLLM_MULTIMODAL_DISAGGREGATED`` takes it
off the worker, which no config says); a draft model is divided as the target is, on the last stage; adapters take the device cache that the
engine makes for them. Activations, workspaces and memory outside torch are rules of thumb, with an error of some GiB.
"""

from __future__ import annotations

from collections import Counter

from dynamo_mpi.common.frozen import dataclass, replace
from dynamo_mpi.common.light_typing import TYPE_CHECKING, Any
from dynamo_mpi.layout.engine_config import DEFAULT_MAX_BATCH_SIZE, DEFAULT_MAX_NUM_TOKENS
from dynamo_mpi.layout.kv_cache import kv_bytes
from dynamo_mpi.layout.layer_weights import dtype_bytes
from dynamo_mpi.layout.layout import Cluster
from dynamo_mpi.layout.weights import stage_weights

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from dynamo_mpi.layout.layout import LayoutSpec
    from dynamo_mpi.layout.model_shape import ModelShape

_GIB = 2**30
_NCCL = int(0.35 * _GIB)
_OTHER = int(3.5 * _GIB)
_GRAPH = int(0.2 * _GIB)
_ALL_GRAPHS = _GIB  # graphs share a pool, so many need hardly more than the largest

# factors of the activations' rule of thumb, by tensor-parallel size (aiconfigurator 0.12)
_ACTIVATIONS = {
    "experts": {1: 22.0, 2: 13.0, 4: 10.0, 8: 10.0},
    "llama": {1: 11.0, 2: 6.5, 4: 5.0, 8: 5.0},
    "other": {1: 10.0, 2: 6.0, 4: 5.0, 8: 5.0},
}

# kinds of speculation whose drafts come from a model of their own
_WITH_DRAFT = frozenset({"EAGLE", "EAGLE3", "DRAFT_TARGET", "DRAFTTARGET", "PARD", "DFLASH", "DSPARK"})
_EAGLE = frozenset({"EAGLE", "EAGLE3"})
_DEFAULT_LORA_RANK = 64  # LoraConfig.max_lora_rank
_QKV = ("attn_q", "attn_k", "attn_v")
# names of Hugging Face's adapters, and the engine's
_HUGGING_FACE = {
    "q_proj": "attn_q",
    "k_proj": "attn_k",
    "v_proj": "attn_v",
    "o_proj": "attn_dense",
    "gate_proj": "mlp_gate",
    "up_proj": "mlp_h_to_4h",
    "down_proj": "mlp_4h_to_h",
}
_MODULES = frozenset(_HUGGING_FACE.values())


@dataclass(frozen=True)
class ExtraWeights:
    """Bytes of one rank beside the language model.

    Args:
        encoders: encoders of images, video and sound.
        draft: the draft model; on the last stage only.
        adapters: the device cache of LoRA adapters.
        uncounted: keys of what can't be counted.
    """

    encoders: int = 0
    draft: int = 0
    adapters: int = 0
    uncounted: tuple[str, ...] = ()


def extra_weights(subject: LayoutSpec) -> ExtraWeights:
    """Count what the ranks of a worker hold beside the language model."""
    uncounted = [name for encoder in subject.shape.encoders for name in encoder.missing]
    encoders = sum(encoder.parameters or 0 for encoder in subject.shape.encoders) * dtype_bytes(subject.shape)
    draft, bytes_of_draft = draft_worker(subject), 0
    if draft is not None:
        (held,) = stage_weights(draft) or (None,)
        if held is None:
            uncounted.append("speculative_config.speculative_model")
        else:
            joined = _eagle_elements(subject, draft.shape)
            bytes_of_draft = held.bytes + joined * dtype_bytes(draft.shape)
            uncounted += [f"speculative_model: {key}" for key in draft.shape.inexact]
    elif needs_draft(subject):
        uncounted.append("speculative_config.speculative_model")
    adapters, unknown = _adapters(subject)
    return ExtraWeights(encoders, bytes_of_draft, adapters, (*uncounted, *unknown))


def needs_draft(subject: LayoutSpec) -> bool:
    """Return whether the engine config asks for speculation by a model of its own."""
    speculative = subject.config.speculative
    return speculative is not None and (speculative.decoding_type or "").upper() in _WITH_DRAFT


def draft_worker(subject: LayoutSpec) -> LayoutSpec | None:
    """Return the draft model as if it were a worker, in one stage and divided as the target; None without one that is known."""
    if subject.draft is None or not needs_draft(subject):
        return None
    config = replace(
        subject.config, pp_size=1, pp_partition=None, speculative=None, moe_ep_size=None, moe_tp_size=None, keys={}
    )
    ranks = config.world_size
    return replace(
        subject, shape=subject.draft, draft=None, config=config, cluster=Cluster(1, ranks, subject.cluster.gpu)
    )


def with_draft(
    subject: LayoutSpec, unlimited: int, windows: tuple[tuple[int, int], ...]
) -> tuple[int, tuple[tuple[int, int], ...]]:
    """Add the draft model's keys and values of a token to those of the last stage, as `kv_cache.kv_bytes` returns them."""
    draft = draft_worker(subject)
    held = None if draft is None else stage_weights(draft)
    if draft is None or held is None:
        return unlimited, windows
    more, narrow = kv_bytes(draft, held[0])
    sizes = Counter(dict(windows))
    sizes.update(dict(narrow))
    return unlimited + more, tuple(sorted(sizes.items()))


def _eagle_elements(subject: LayoutSpec, draft: ModelShape) -> int:
    """EAGLE-3 joins three hidden states of the target, and its attention takes embedding and hidden state side by side."""
    speculative, hidden = subject.config.speculative, draft.hidden_size or 0
    if speculative is None or (speculative.decoding_type or "").upper() not in _EAGLE:
        return 0
    sizes = (draft.attention_heads or 0) + 2 * (draft.kv_heads or 0)
    beside = hidden * sizes * (draft.head_dim or 0) // max(1, subject.layout.attention_tp_size)
    return 3 * (subject.shape.hidden_size or hidden) * hidden + beside


def _adapters(subject: LayoutSpec) -> tuple[int, tuple[str, ...]]:
    """LoRA: ``num_device_module_layer`` sets of the largest module at rank 1, for ``max_loras`` adapters of ``max_lora_rank``
    (``pyexecutor/_util.py``; ``PeftCacheConfig``).

    Returns:
        Their bytes on a rank; the keys of what can't be counted.
    """
    keys = subject.config.keys
    lora, cache = _section(keys, "lora_config"), _section(keys, "peft_cache_config")
    if not lora and keys.get("enable_lora") is not True:
        return 0, ()
    names = lora.get("lora_target_modules")
    given = (
        [_HUGGING_FACE.get(name, name) for name in names if isinstance(name, str)] if isinstance(names, list) else []
    )
    if not set(given).isdisjoint(_QKV):
        given += _QKV
    modules = list(dict.fromkeys(given))
    widths = {name: width for name, width in _module_widths(subject) if name in modules}
    unknown = tuple(f"lora_config.lora_target_modules ({name[:40]})" for name in modules if name not in widths)
    if not modules:
        return 0, ("lora_config.lora_target_modules",)
    slots = _count(cache.get("num_device_module_layer"))
    loras = _count(lora.get("max_loras"))
    if loras is not None:
        rank = _count(lora.get("max_lora_rank")) or _DEFAULT_LORA_RANK
        slots = rank * (subject.shape.num_layers or 0) * len(modules) * loras
    if slots is None:
        return 0, ("lora_config.max_loras", *unknown)
    return slots * max(widths.values(), default=0) * dtype_bytes(subject.shape), unknown


def _module_widths(subject: LayoutSpec) -> Iterator[tuple[str, int]]:
    """Yield the elements of each module's adapter at rank 1, on one rank: inputs and outputs, one of them divided over the ranks."""
    shape, ranks = subject.shape, max(1, subject.layout.attention_tp_size)
    hidden, size = shape.hidden_size, shape.head_dim
    if hidden is None:
        return
    if shape.attention_heads is not None and size is not None:
        queries = shape.attention_heads * size // ranks
        yield "attn_q", hidden + queries
        yield "attn_dense", queries + hidden
        if shape.kv_heads is not None:
            yield "attn_k", hidden + -(-shape.kv_heads // ranks) * size
            yield "attn_v", hidden + -(-shape.kv_heads // ranks) * size
    width = max(shape.dense_widths, default=0) // max(1, subject.layout.dense_tp_size)
    if width:
        yield from ((name, hidden + width) for name in ("mlp_gate", "mlp_h_to_4h", "mlp_4h_to_h"))


def _section(keys: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    value = keys.get(name)
    return value if isinstance(value, dict) else {}


def _count(value: object) -> int | None:
    """Return a positive whole number of a sensible size; rules about keys report others."""
    return value if isinstance(value, int) and not isinstance(value, bool) and 0 < value < 2**31 else None


def activation_bytes(subject: LayoutSpec) -> int:
    """Return the activations of the largest step, by a rule of thumb."""
    shape, config = subject.shape, subject.config
    ranks = max(size for size in (1, 2, 4, 8) if size <= subject.layout.attention_tp_size)
    width = (shape.attention_heads or 0) * (shape.value_size or 0) or shape.hidden_size or 0
    family = "other"
    if shape.experts is not None or shape.latent is not None:
        family = "experts"
    elif shape.name.lower().startswith("llama"):
        family = "llama"
    return int(2 * (config.max_num_tokens or DEFAULT_MAX_NUM_TOKENS) * width * _ACTIVATIONS[family][ranks])


def workspace_bytes(subject: LayoutSpec) -> int:
    """C4: return the workspace for the exchange of tokens between experts. It grows with attention DP, unless the engine config limits it."""
    experts, config, layout = subject.shape.experts, subject.config, subject.layout
    if experts is None or not experts.per_token:
        return 0
    tokens = config.moe.max_num_tokens or (config.max_num_tokens or DEFAULT_MAX_NUM_TOKENS) * layout.dp_size
    width = subject.shape.hidden_size or 0
    return 4 * tokens * width * experts.count * experts.per_token // max(1, layout.moe_ep_size) // 128


def outside_bytes(subject: LayoutSpec) -> int:
    """Return the memory outside torch: NCCL, CUDA graphs, and the rest."""
    config = subject.config
    graphs = 0
    if config.cuda_graphs:
        count = len(config.cuda_graph_batch_sizes or ())
        largest = config.cuda_graph_max_batch_size or config.max_batch_size or DEFAULT_MAX_BATCH_SIZE
        graphs = min(_ALL_GRAPHS, _GRAPH * (count or largest))
    return _OTHER + graphs + (_NCCL if subject.layout.world_size > 1 else 0)
