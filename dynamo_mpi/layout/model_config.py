# SPDX-License-Identifier: Apache-2.0
"""Reads a model's shape from its ``config.json`` alone: no transformers, no remote code, no weights."""

from __future__ import annotations

from dynamo_mpi.common.config_reader import Reader, parse_json
from dynamo_mpi.layout.layer_patterns import read_layers
from dynamo_mpi.layout.model_shape import Experts, Feed, LatentAttention, Layer, ModelShape, StateSpace
from dynamo_mpi.layout.quantisation import read_quantisation

_NESTED = ("text_config", "llm_config", "language_config", "thinker_config", "language_model")
_MAX_HEADS = 65_536
_MAX_LAYERS = 10_000
_MAX_EXPERTS = 65_536
# model types whose MLP has no gate: up and down only
_UNGATED = (
    "nemotron",
    "gpt2",
    "gpt_neox",
    "gptj",
    "falcon",
    "opt",
    "bloom",
    "starcoder2",
    "phi",
    "mpt",
    "t5",
    "bart",
    "whisper",
)
_GATED_IN_SPITE_OF_NAME = ("phi3", "phimoe", "phi4", "phi-msft")


def parse_model_shape(text: str, path: str, quant_text: str | None = None) -> ModelShape:
    """Read the text of a ``config.json``.

    Args:
        text: its contents.
        path: where it was found, for messages.
        quant_text: the contents of ``hf_quant_config.json`` beside it, if it exists.

    Raises:
        ConfigFileError: one of them isn't JSON, isn't an object, or a size in it isn't a whole number in a sensible range.
    """
    needed = "the model's own config.json"
    config = Reader(parse_json(text, path, needed), path)
    quant_file = None
    if quant_text is not None:
        quant_path = path.rpartition("/")[0] + "/hf_quant_config.json"
        quant_file = Reader(parse_json(quant_text, quant_path, "ModelOpt's hf_quant_config.json"), quant_path)
    body = _body(config)
    quantisation = read_quantisation(config, quant_file)
    heads = body.size("num_attention_heads", "n_head", "n_heads", "num_heads", maximum=_MAX_HEADS)
    hidden_size = body.size("hidden_size", "n_embd", "d_model", "dim")
    num_layers = body.size("num_hidden_layers", "n_layer", "n_layers", "num_layers", maximum=_MAX_LAYERS)
    latent = _latent(body)
    experts = _experts(body)
    layers = None
    if num_layers is not None:
        layers = read_layers(body, num_layers, experts=experts is not None, quantisation=quantisation)
    return ModelShape(
        name=_name(config),
        attention_heads=heads,
        kv_heads=None if latent else _kv_heads(body, heads),
        head_dim=_head_dim(body, heads, hidden_size),
        value_head_dim=None if latent else body.size("v_head_dim"),
        num_layers=num_layers,
        hidden_size=hidden_size,
        intermediate_size=_dense_size(body, experts, layers),
        vocab_size=body.size("vocab_size", "padded_vocab_size"),
        context_length=body.size("max_position_embeddings", "n_positions", "seq_length", "max_seq_len"),
        latent=latent,
        experts=experts,
        state_space=_state_space(body),
        layers=layers,
        output_groups=body.size("o_groups", maximum=_MAX_HEADS),
        index_head_dim=body.size("index_head_dim") if body.has("index_topk") else None,
        index_heads=body.size("index_n_heads") if body.has("index_topk") else None,
        output_gate=body.values.get("attn_output_gate") is True or _model_type(body) == "qwen3_next",
        gated_mlp=_gated(body),
        tied_embeddings=_tied(body, config),
        nextn_layers=body.size("num_nextn_predict_layers", "mtp_num_hidden_layers", "num_mtp_modules", minimum=0) or 0,
        encoder_decoder=config.values.get("is_encoder_decoder") is True,
        dtype=_dtype(body) or _dtype(config),
        quantisation=quantisation,
        bos_token_id=_token(config.values.get("bos_token_id", body.values.get("bos_token_id"))),
        model_type=_model_type(body),
        unknown=_unknown(body, heads, num_layers, layers, latent),
    )


def _body(config: Reader) -> Reader:
    """Find the language model inside a multimodal one."""
    body = config
    for _ in range(2):
        inner = next((key for key in _NESTED if isinstance(body.values.get(key), dict)), None)
        if inner is None:
            break
        body = body.section(inner)
    return body


def _name(config: Reader) -> str:
    architectures = config.values.get("architectures")
    if isinstance(architectures, list) and architectures:
        architectures = architectures[0]
    if isinstance(architectures, str) and architectures:
        # JSON can contain a lone surrogate, which can't be printed
        return architectures.encode("utf-8", "replace").decode()
    return str(config.values.get("model_type", "unknown"))


def _model_type(body: Reader) -> str:
    return str(body.values.get("model_type", ""))


def _kv_heads(body: Reader, heads: int | None) -> int | None:
    if body.values.get("multi_query") is True:  # Falcon-7B, StarCoder
        return 1
    inner = body.section("attn_config") if isinstance(body.values.get("attn_config"), dict) else body
    found = body.size("num_key_value_heads", "n_head_kv", "num_kv_heads", "multi_query_group_num", maximum=_MAX_HEADS)
    # if the key is missing, every attention head has its own KV head, in every class of transformers
    return found or inner.size("kv_n_heads", maximum=_MAX_HEADS) or heads


def _head_dim(body: Reader, heads: int | None, hidden_size: int | None) -> int | None:
    """B8: the engine takes ``head_dim`` if the config has one, else hidden size / heads, rounded down."""
    found = body.size("head_dim", "attention_head_dim", "kv_channels")
    if found is None and heads is not None and hidden_size is not None:
        return hidden_size // heads
    return found


def _latent(body: Reader) -> LatentAttention | None:
    rank = body.size("kv_lora_rank")
    if rank is None:
        return None
    return LatentAttention(
        rank,
        body.size("q_lora_rank"),
        body.size("qk_nope_head_dim", minimum=0),
        body.size("qk_rope_head_dim", minimum=0),
        body.size("v_head_dim"),
    )


def _experts(body: Reader) -> Experts | None:
    count = body.size(
        "num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts", minimum=0, maximum=_MAX_EXPERTS
    )
    inner = body
    if count is None and isinstance(body.values.get("ffn_config"), dict):  # DBRX
        inner = body.section("ffn_config")
        count = inner.size("moe_num_experts", minimum=0, maximum=_MAX_EXPERTS)
    if not count:
        return None
    per_token = inner.size("num_experts_per_tok", "experts_per_token", "moe_top_k", "moe_topk", "moe_k", minimum=0)
    width = inner.size("moe_intermediate_size", "expert_ffn_hidden_size", "intermediate_size", "ffn_hidden_size")
    return Experts(count, per_token, width, _shared_size(body, width), inner.size("moe_latent_size"))


def _shared_size(body: Reader, expert_width: int | None) -> int:
    found = body.size(
        "shared_expert_intermediate_size", "moe_shared_expert_intermediate_size", "shared_intermediate_size", minimum=0
    )
    if found is not None:
        return found
    if _model_type(body).startswith("llama4"):
        return expert_width or 0  # one beside the routed ones, with the same width
    shared = body.size(
        "n_shared_experts", "num_shared_experts", "moe_num_shared_experts", minimum=0, maximum=_MAX_EXPERTS
    )
    return (shared or 0) * (expert_width or 0)


def _dense_size(body: Reader, experts: Experts | None, layers: tuple[Layer, ...] | None) -> int | None:
    """Width of the dense MLP: None if no layer has one; then the key means the experts, or nothing."""
    if experts is not None and layers is not None and not any(layer.feed is Feed.DENSE for layer in layers):
        return None
    return body.size("intermediate_size_mlp", "intermediate_size", "ffn_hidden_size", "n_inner", "d_ff")


def _state_space(body: Reader) -> StateSpace | None:
    heads = body.size("linear_num_value_heads", maximum=_MAX_HEADS)
    if heads is not None:
        groups = body.size("linear_num_key_heads", maximum=_MAX_HEADS)
        return StateSpace(
            heads,
            groups or heads,
            body.size("linear_value_head_dim"),
            body.size("linear_key_head_dim"),
            body.size("linear_conv_kernel_dim"),
        )
    heads = body.size("mamba_num_heads", "mamba_n_heads", maximum=_MAX_HEADS)
    if heads is None:
        return None
    return StateSpace(
        heads,
        body.size("n_groups", "mamba_n_groups", "mamba_num_groups", maximum=_MAX_HEADS) or 1,
        body.size("mamba_head_dim", "mamba_d_head"),
        body.size("ssm_state_size", "mamba_d_state"),
        body.size("conv_kernel", "mamba_d_conv"),
    )


def _gated(body: Reader) -> bool:
    if body.values.get("mlp_hidden_act") == "relu2":
        return False
    kind = _model_type(body)
    return not kind.startswith(_UNGATED) or kind.startswith(_GATED_IN_SPITE_OF_NAME)


def _tied(body: Reader, config: Reader) -> bool | None:
    for reader in (body, config):
        if (said := reader.switch("tie_word_embeddings")) is not None:
            return said
    # transformers' Gemma classes tie by default, and their configs may lack the key
    return True if _model_type(body).startswith("gemma") else None


def _dtype(reader: Reader) -> str | None:
    value = reader.values.get("torch_dtype", reader.values.get("dtype"))
    return value.removeprefix("torch.") if isinstance(value, str) else None


def _token(value: object) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and value >= 0 else None


def _unknown(
    body: Reader,
    heads: int | None,
    num_layers: int | None,
    layers: tuple[Layer, ...] | None,
    latent: LatentAttention | None,
) -> tuple[str, ...]:
    """Name the missing values that rules need."""
    missing = [] if heads is not None else ["num_attention_heads"]
    if num_layers is None:
        missing.append("num_hidden_layers")
    elif layers is None:
        missing.append("the kinds of its layers")
    missing += [
        key
        for key in ("hidden_size", "vocab_size")
        if not (body.has(key) or body.has({"hidden_size": "n_embd"}.get(key, key)))
    ]
    if latent is not None:
        missing += [key for key in ("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim") if not body.has(key)]
    return tuple(missing)
