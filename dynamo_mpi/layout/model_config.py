# SPDX-License-Identifier: Apache-2.0
"""Reads a model's shape from its ``config.json`` alone: no transformers, no remote code, no weights."""

from __future__ import annotations

from dynamo_mpi.common.config_reader import ConfigReader, parse_json
from dynamo_mpi.common.display import sanitize
from dynamo_mpi.common.frozen import replace
from dynamo_mpi.common.light_typing import TYPE_CHECKING
from dynamo_mpi.layout.config_keys import TrackedKeys, judge_unread
from dynamo_mpi.layout.layer_patterns import count_layers, read_layers
from dynamo_mpi.layout.model_parts import (
    MAX_HEADS,
    read_compressed,
    read_encoders,
    read_experts,
    read_indexer,
    read_latent,
    read_state_space,
)
from dynamo_mpi.layout.model_shape import Experts, Feed, Layer, Mixer, ModelShape
from dynamo_mpi.layout.quantisation import MXFP4, WeightFormat
from dynamo_mpi.layout.quantisation_config import mtp_format, read_quantisation, with_formats

if TYPE_CHECKING:
    from dynamo_mpi.layout.quantisation import Quantisation

_NESTED = ("text_config", "llm_config", "language_config", "thinker_config", "language_model")
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
_GATED_IN_SPITE_OF_NAME = ("phi3", "phimoe", "phi4", "phi-msft", "nemotron-nas")


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
    keys = TrackedKeys(parse_json(text, path, needed))
    config = ConfigReader(keys, path)
    quant_file = None
    if quant_text is not None:
        quant_path = path.rpartition("/")[0] + "/hf_quant_config.json"
        quant_file = ConfigReader(parse_json(quant_text, quant_path, "ModelOpt's hf_quant_config.json"), quant_path)
    body = _body(config)
    quantisation = read_quantisation(config, quant_file)
    heads = body.size("num_attention_heads", "n_head", "n_heads", "num_heads", maximum=MAX_HEADS)
    hidden_size = body.size("hidden_size", "n_embd", "d_model", "dim")
    num_layers = count_layers(body)
    latent, compressed = read_latent(body), read_compressed(body)
    experts = read_experts(body)
    layers, unknown_layers = None, tuple[str, ...]()
    if num_layers is not None:
        layers, unknown_layers = read_layers(
            body, num_layers, experts=experts is not None, heads=heads, hidden_size=hidden_size
        )
    expert_format = WeightFormat(MXFP4) if body.text("expert_dtype") == "fp4" else None
    if layers is not None:
        layers = with_formats(layers, quantisation, expert_format)
    nextn = _nextn(body)
    index_heads, index_head_dim = read_indexer(body)
    shape = ModelShape(
        name=_name(config),
        attention_heads=heads,
        kv_heads=None if latent else _kv_heads(body, heads, layers),
        head_dim=_head_dim(body, heads, hidden_size),
        value_head_dim=None if latent else body.size("v_head_dim"),
        num_layers=num_layers,
        hidden_size=hidden_size,
        intermediate_size=_dense_size(body, experts, layers),
        vocab_size=body.size("vocab_size", "padded_vocab_size"),
        draft_vocab_size=body.size("draft_vocab_size"),
        context_length=body.size("max_position_embeddings", "n_positions", "seq_length", "max_seq_len"),
        latent=latent,
        experts=experts,
        state_space=read_state_space(body),
        layers=layers,
        unknown_layers=unknown_layers,
        compressed=compressed,
        index_head_dim=index_head_dim,
        index_heads=index_heads,
        output_gate=_output_gate(body),
        head_gate=body.values.get("use_head_wise_attn_gate") is True,
        gated_mlp=_gated(body),
        tied_embeddings=_tied(body, config),
        per_layer_input=body.size("hidden_size_per_layer_input", minimum=0) or 0,
        per_layer_vocab=body.size("vocab_size_per_layer_input") or 0,
        head_format=_head_format(quantisation),
        nextn_layers=nextn,
        nextn_layer=_nextn_layer(layers, quantisation, expert_format) if nextn else None,
        encoder_decoder=True in [reader.values.get("is_encoder_decoder") for reader in (config, body)],
        dtype=_dtype(body, config),
        quantisation=quantisation,
        bos_token_id=_token(config.values.get("bos_token_id", body.values.get("bos_token_id"))),
        model_type=_model_type(body),
        encoders=read_encoders(config),
    )
    unread, inexact, which_layers = judge_unread(keys)
    if which_layers and layers is not None:
        # a list of kinds that no reader knows: all layers alike would be a guess
        shape = replace(shape, layers=None, nextn_layer=None, unknown_layers=which_layers)
    return replace(shape, missing=_missing(body, shape), unread=unread, inexact=inexact)


def _body(config: ConfigReader) -> ConfigReader:
    """Find the language model inside a multimodal one."""
    body = config
    for _ in range(2):
        inner = next((key for key in _NESTED if isinstance(body.values.get(key), dict)), None)
        if inner is None:
            break
        body = body.section(inner)
    return body


def _name(config: ConfigReader) -> str:
    architectures = config.values.get("architectures")
    if isinstance(architectures, list) and architectures:
        architectures = architectures[0]
    if isinstance(architectures, str) and architectures:
        # JSON can contain a lone surrogate, which can't be printed
        return sanitize(architectures.encode("utf-8", "replace").decode())
    return sanitize(str(config.values.get("model_type", "unknown")))


def _model_type(body: ConfigReader) -> str:
    return str(body.values.get("model_type", ""))


def _kv_heads(body: ConfigReader, heads: int | None, layers: tuple[Layer, ...] | None) -> int | None:
    if body.values.get("multi_query") is True:  # Falcon-7B, StarCoder
        return 1
    inner = body.section("attn_config") if isinstance(body.values.get("attn_config"), dict) else body
    found = body.size(
        *("num_key_value_heads", "n_head_kv", "num_kv_heads", "multi_query_group_num", "num_attention_groups"),
        maximum=MAX_HEADS,
    )
    found = found or inner.size("kv_n_heads", maximum=MAX_HEADS)
    if found is None and layers is not None and body.has("block_configs"):
        return max((layer.sizes.kv_heads or 0 for layer in layers), default=0) or None
    # if the key is missing, every attention head has its own KV head, in every class of transformers
    return found or (None if body.has("block_configs") else heads)


def _head_dim(body: ConfigReader, heads: int | None, hidden_size: int | None) -> int | None:
    """B8: the engine takes ``head_dim`` if the config has one, else hidden size / heads, rounded down."""
    found = body.size("head_dim", "attention_head_dim", "kv_channels")
    if found is None and heads is not None and hidden_size is not None:
        return hidden_size // heads
    return found


def _dense_size(body: ConfigReader, experts: Experts | None, layers: tuple[Layer, ...] | None) -> int | None:
    """Width of the dense MLP: None if no layer has one; then the key means the experts, or nothing."""
    if (
        experts is not None
        and layers is not None
        and not any(layer.feed is Feed.DENSE or layer.mlp_beside_experts for layer in layers)
    ):
        return None
    width = body.size(
        *(
            "block_ff_dim",
            "intermediate_size_mlp",
            "dense_intermediate_size",
            "intermediate_size",
            "ffn_hidden_size",
            "n_inner",
            "d_ff",
            "ffn_dim",
        )
    )
    return _adjusted(body, width) if body.has("block_ff_dim") or _model_type(body).startswith("lfm2") else width


def _adjusted(body: ConfigReader, width: int | None) -> int | None:
    """LFM2 takes two thirds of the width that its config has, rounded up to whole multiples (``Lfm2MLP``)."""
    factor, multiple = body.number("block_ffn_dim_multiplier"), body.size("block_multiple_of") or 256
    if width is None or body.values.get("block_auto_adjust_ff_dim") is False:
        return width
    narrowed = int((1.0 if factor is None or not 0 < factor < 1000 else factor) * (2 * width // 3))
    return -(-narrowed // multiple) * multiple


def _output_gate(body: ConfigReader) -> bool:
    gates = ("attn_output_gate", "attention_output_gate", "mla_use_output_gate")
    return any(body.values.get(key) is True for key in gates) or _model_type(body) == "qwen3_next"


def _head_format(quantisation: Quantisation | None) -> WeightFormat | None:
    if quantisation is None or not (quantisation.covers_head or quantisation.modules):
        return None
    if quantisation.excludes("lm_head"):
        return None
    form = quantisation.format_of(("lm_head",))
    return form if quantisation.covers_head or form != quantisation.base else None


def _nextn(body: ConfigReader) -> int:
    found = body.size(
        *("num_nextn_predict_layers", "mtp_num_hidden_layers", "num_mtp_modules", "mtp_num_layers", "num_mtp_layers"),
        minimum=0,
    )
    return found or 0


def _nextn_layer(
    layers: tuple[Layer, ...] | None, quantisation: Quantisation | None, experts: WeightFormat | None
) -> Layer | None:
    """F6: one layer for multi-token prediction: attention without a window, and what the last layer feeds to."""
    if not layers:
        return None
    attention = next((layer for layer in reversed(layers) if layer.mixer is Mixer.ATTENTION), Layer())
    feed = next((layer for layer in reversed(layers) if layer.feed is not Feed.NONE), Layer())
    layer = replace(feed, mixer=Mixer.ATTENTION, window=None, sizes=attention.sizes)
    return mtp_format(layer, len(layers), quantisation, experts)


def _gated(body: ConfigReader) -> bool:
    if body.values.get("mlp_hidden_act") == "relu2":
        return False
    kind = _model_type(body)
    return not kind.startswith(_UNGATED) or kind.startswith(_GATED_IN_SPITE_OF_NAME)


def _tied(body: ConfigReader, config: ConfigReader) -> bool | None:
    keys = ("tie_word_embeddings", "tie_embedding")
    said = [reader.switch(key) for reader in (body, config) for key in keys]
    # transformers' Gemma and LFM2 classes tie by default, and their configs may lack the key
    default = True if _model_type(body).startswith(("gemma", "lfm2")) else None
    return next((value for value in said if value is not None), default)


def _dtype(*readers: ConfigReader) -> str | None:
    named = [reader.values.get(key) for reader in readers for key in ("torch_dtype", "dtype")]
    return next((value.removeprefix("torch.") for value in named if isinstance(value, str)), None)


def _token(value: object) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and value >= 0 else None


def _missing(body: ConfigReader, shape: ModelShape) -> tuple[str, ...]:
    """Name the missing values that rules need, and keys with kinds of layers that aren't known."""
    missing = [] if shape.attention_heads is not None else ["num_attention_heads"]
    if shape.num_layers is None:
        missing.append("num_hidden_layers")
    elif shape.layers is None:
        missing += shape.unknown_layers or ("the kinds of its layers",)
    missing += [key for key in ("hidden_size", "vocab_size") if getattr(shape, key) is None]
    if shape.latent is not None:
        missing += [key for key in ("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim") if not body.has(key)]
    return tuple(missing)
