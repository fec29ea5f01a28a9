# SPDX-License-Identifier: Apache-2.0
"""Do ranks share weights out without loss? (Sums of published models: test_published_models.py.)"""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dynamo_mpi.layout.engine_config import EngineConfig, Moe, Speculative
from dynamo_mpi.layout.layout import Cluster, LayoutSpec
from dynamo_mpi.layout.model_config import parse_model_shape
from dynamo_mpi.layout.model_shape import (
    Experts,
    Feed,
    LatentAttention,
    Layer,
    LayerFormats,
    Mixer,
    ModelShape,
    StateSpace,
)
from dynamo_mpi.layout.quantisation import Quantisation
from dynamo_mpi.layout.weights import missing_sizes, stage_weights, total_parameters
from tests.unit.model_zoo import QUANT_FILES, ZOO

DENSE = ModelShape(
    name="LlamaForCausalLM",
    attention_heads=64,
    kv_heads=8,
    head_dim=128,
    num_layers=13,
    hidden_size=8192,
    intermediate_size=28672,
    vocab_size=128256,
    layers=(Layer(),) * 13,
    dtype="bfloat16",
)


def shape_of(name: str) -> ModelShape:
    quant = QUANT_FILES.get(name)
    return parse_model_shape(json.dumps(ZOO[name]), f"{name}/config.json", json.dumps(quant) if quant else None)


def unquantised(shape: ModelShape) -> ModelShape:
    layers = tuple(replace(layer, formats=LayerFormats()) for layer in shape.layers or ())
    return replace(shape, quantisation=None, layers=layers)


def subject(shape: ModelShape, nodes: int = 1, gpus: int = 8, **keys: Any) -> LayoutSpec:
    return LayoutSpec(shape, EngineConfig(**keys), Cluster(nodes, gpus))


@pytest.mark.parametrize(
    ("changes", "missing"),
    [
        ({"hidden_size": None}, "hidden_size"),
        ({"vocab_size": None}, "vocab_size"),
        ({"attention_heads": None}, "num_attention_heads"),
        ({"kv_heads": None}, "num_key_value_heads"),
        ({"head_dim": None}, "head_dim"),
        ({"intermediate_size": None}, "intermediate_size"),
        ({"layers": None}, "the kinds of its layers"),
        ({"layers": None, "num_layers": None}, "num_hidden_layers"),
        ({"latent": LatentAttention(512, None, None, 64, 128)}, "qk_nope_head_dim"),
        ({"layers": (Layer(feed=Feed.EXPERTS),), "experts": Experts(8, 2, None)}, "moe_intermediate_size"),
        ({"layers": (Layer(feed=Feed.EXPERTS),)}, "moe_intermediate_size"),
        ({"layers": (Layer(Mixer.MAMBA2),)}, "the sizes of its state space"),
        (
            {"layers": (Layer(Mixer.GATED_DELTA),), "state_space": StateSpace(8, 8, 64, None, 4)},
            "the sizes of its state space",
        ),
        ({"encoder_decoder": True}, "the encoder's layers"),
        (
            {"quantisation": Quantisation("MIXED_PRECISION", certain=False)},
            "quantized_layers, which MIXED_PRECISION needs",
        ),
    ],
)
def test_what_a_config_does_not_say_is_named_and_not_guessed(changes: dict[str, Any], missing: str) -> None:
    shape = replace(DENSE, **changes)
    assert missing_sizes(shape) == (missing,)
    assert total_parameters(shape) is None
    assert stage_weights(subject(shape)) is None


@given(tp_size=st.sampled_from([1, 2, 4, 8]), pp_size=st.integers(1, 13))
def test_ranks_hold_a_dense_model_between_them_once(tp_size: int, pp_size: int) -> None:
    stages = stage_weights(subject(DENSE, nodes=13, tp_size=tp_size, pp_size=pp_size))
    assert stages is not None
    assert [stage.layers for stage in stages] == subject(DENSE, tp_size=tp_size, pp_size=pp_size).layout.stage_sizes(13)
    assert sum(stage.elements.total for stage in stages) * tp_size == total_parameters(DENSE)
    assert all(stage.bytes == 2 * stage.elements.total for stage in stages)


@given(tp_size=st.sampled_from([1, 2, 4]), ep_share=st.sampled_from([1, 2, 4]), pp_size=st.integers(1, 8))
def test_ranks_hold_experts_between_them_once_and_the_router_each(tp_size: int, ep_share: int, pp_size: int) -> None:
    shape = shape_of("Qwen3-30B-A3B")
    layout = {"tp_size": tp_size, "pp_size": pp_size, "moe_ep_size": min(ep_share, tp_size)}
    stages, whole = stage_weights(subject(shape, nodes=4, **layout)), stage_weights(subject(shape))
    assert stages is not None
    assert whole is not None
    for part in ("mixer", "experts", "embedding", "head"):
        assert sum(getattr(stage.elements, part) for stage in stages) * tp_size == getattr(whole[0].elements, part)
    assert sum(stage.elements.router for stage in stages) == whole[0].elements.router


@pytest.mark.parametrize("name", sorted(ZOO))
def test_more_tensor_parallelism_never_means_more_weights_per_rank(name: str) -> None:
    shape = shape_of(name)
    sizes = []
    for tp_size in (1, 2, 4, 8, 16, 32):
        stages = stage_weights(subject(shape, nodes=4, tp_size=tp_size))
        assert stages is not None
        sizes.append(max(stage.bytes for stage in stages))
    assert sizes == sorted(sizes, reverse=True)


def test_kv_heads_that_are_fewer_than_ranks_are_copied() -> None:
    eight, sixteen = (stage_weights(subject(DENSE, nodes=2, tp_size=tp)) for tp in (8, 16))
    assert eight is not None
    assert sixteen is not None
    one_head = 13 * 2 * 8192 * 128
    assert eight[0].elements.mixer - one_head == 2 * (sixteen[0].elements.mixer - one_head)


def test_attention_dp_holds_attention_embedding_head_and_mlps_whole_and_divides_experts() -> None:
    shape = shape_of("DeepSeek-R1")
    (whole,) = stage_weights(subject(shape)) or ()
    (rank,) = stage_weights(subject(shape, tp_size=8, moe_ep_size=8, enable_attention_dp=True)) or ()
    for part in ("mixer", "dense", "shared", "router", "embedding", "head"):
        assert getattr(rank.elements, part) == getattr(whole.elements, part)
    assert rank.elements.experts * 8 == whole.elements.experts


def test_deepseek_divides_its_dense_mlps_no_further_than_a_node() -> None:
    shape = shape_of("DeepSeek-R1")
    (eight,) = stage_weights(subject(shape, tp_size=8)) or ()
    (sixteen,) = stage_weights(subject(shape, nodes=2, tp_size=16)) or ()
    (one_node,) = stage_weights(subject(shape, gpus=16, tp_size=16)) or ()
    assert sixteen.elements.dense == eight.elements.dense == 2 * one_node.elements.dense
    assert sixteen.elements.experts * 2 == eight.elements.experts


def test_block_scales_count_in_what_deepseek_divides_by() -> None:
    # 2048 wide shared experts are 16 blocks of 128
    shape = shape_of("DeepSeek-R1")
    (plain,) = stage_weights(subject(unquantised(shape), gpus=32, tp_size=32)) or ()
    (blocks,) = stage_weights(subject(shape, gpus=32, tp_size=32)) or ()
    assert blocks.elements.shared == 2 * plain.elements.shared


def test_the_ends_of_a_pipeline_hold_embedding_and_head() -> None:
    stages = stage_weights(subject(DENSE, tp_size=2, pp_size=3)) or ()
    rows = 128256 // 2 * 8192
    assert [stage.elements.embedding for stage in stages] == [rows, 0, 0]
    assert [stage.elements.head for stage in stages] == [0, 0, rows]


def test_values_shorter_than_keys_and_more_kv_heads_under_a_window_are_counted() -> None:
    (stage,) = stage_weights(subject(shape_of("MiMo-V2-Flash"))) or ()
    heads, wide, narrow = 64, 192, 128
    windowed, others = 39 * 4096 * 8 * (wide + narrow), 9 * 4096 * 4 * (wide + narrow)
    assert stage.elements.mixer == 48 * 4096 * heads * (wide + narrow) + windowed + others


def test_tied_embeddings_are_one_matrix_only_without_a_pipeline() -> None:
    tied = replace(DENSE, tied_embeddings=True)
    (one,) = stage_weights(subject(tied)) or ()
    assert (one.elements.embedding, one.elements.head) == (128256 * 8192, 0)
    first, last = stage_weights(subject(tied, pp_size=2)) or ()
    assert first.elements.embedding == last.elements.head == 128256 * 8192


def test_a_vocabulary_that_does_not_divide_is_padded() -> None:
    (stage,) = stage_weights(subject(replace(DENSE, vocab_size=32001), tp_size=2)) or ()
    assert stage.elements.head == 16001 * 8192


def test_helix_divides_everything_but_keys_and_queries_by_its_context_ranks_too() -> None:
    helix: dict[str, Any] = {"tp_size": 2, "cp_size": 4, "cp_type": "HELIX"}
    (stage,) = stage_weights(subject(DENSE, **helix)) or ()
    (plain,) = stage_weights(subject(DENSE, tp_size=8)) or ()
    assert stage.elements.dense == plain.elements.dense
    assert stage.elements.head == plain.elements.head
    assert stage.elements.mixer == 13 * 8192 * 128 * (64 // 2 + 2 * 8 // 2 + 64 // 8)


def test_a_load_balancer_holds_its_slots_instead_of_experts() -> None:
    shape = shape_of("DeepSeek-R1")
    layout: dict[str, Any] = {"tp_size": 8, "moe_ep_size": 8, "enable_attention_dp": True}
    (plain,) = stage_weights(subject(shape, **layout)) or ()
    (slots,) = stage_weights(subject(shape, **layout, moe=Moe(balanced=True, num_slots=288))) or ()
    assert slots.elements.experts * 256 == plain.elements.experts * 288


def test_prediction_of_several_tokens_adds_a_layer_to_the_last_stage() -> None:
    shape = shape_of("DeepSeek-R1")
    plain = stage_weights(subject(shape, tp_size=8, pp_size=2)) or ()
    mtp = stage_weights(subject(shape, tp_size=8, pp_size=2, speculative=Speculative("MTP", max_draft_len=3))) or ()
    eagle = stage_weights(subject(shape, tp_size=8, pp_size=2, speculative=Speculative("Eagle", max_draft_len=3)))
    assert mtp[0] == plain[0]
    assert eagle == plain
    assert mtp[1].layers == plain[1].layers
    one_layer = 11.5e9 / 8  # 684.5e9 less 671.0e9, less an embedding and a head that the engine shares
    assert mtp[1].elements.total - plain[1].elements.total == pytest.approx(one_layer, rel=0.2)


def test_only_what_the_checkpoint_quantises_shrinks() -> None:
    mxfp4 = shape_of("gpt-oss-120b")
    (stage,) = stage_weights(subject(mxfp4)) or ()
    parts = stage.elements
    assert stage.bytes == round(parts.experts * (0.5 + 1 / 32)) + 2 * (parts.total - parts.experts)
    (whole,) = stage_weights(subject(unquantised(mxfp4))) or ()
    assert whole.bytes == 2 * parts.total


def test_kimi_k2_5_packs_its_experts_in_groups_of_32() -> None:
    (stage,) = stage_weights(subject(shape_of("Kimi-K2.5"))) or ()
    parts = stage.elements
    assert stage.bytes == pytest.approx(parts.experts * (0.5 + 2 / 32) + 2 * (parts.total - parts.experts))


def test_a_calibrated_kv_cache_alone_leaves_the_weights_as_they_are() -> None:
    shape = replace(
        DENSE,
        quantisation=Quantisation("NONE", kv_algo="FP8"),
        layers=(Layer(),),
    )
    (stage,) = stage_weights(subject(shape)) or ()
    assert stage.bytes == 2 * stage.elements.total


FIELDS = [
    "attention_heads",
    "kv_heads",
    "head_dim",
    "num_layers",
    "hidden_size",
    "intermediate_size",
    "vocab_size",
    "context_length",
]
FIELDS += ["latent", "experts", "state_space", "layers", "dtype", "quantisation", "index_head_dim", "index_heads"]


@given(
    name=st.sampled_from(sorted(ZOO)),
    gone=st.sets(st.sampled_from(FIELDS)),
    tp_size=st.integers(1, 9),
    pp_size=st.integers(1, 5),
    attention_dp=st.booleans(),
)
def test_a_shape_with_holes_is_counted_or_named_and_never_fatal(
    name: str, gone: set[str], tp_size: int, pp_size: int, attention_dp: bool
) -> None:
    holes: dict[str, Any] = dict.fromkeys(gone)
    shape = replace(shape_of(name), **holes)
    stages = stage_weights(subject(shape, tp_size=tp_size, pp_size=pp_size, enable_attention_dp=attention_dp))
    assert (stages is None) == bool(missing_sizes(shape))
    assert (total_parameters(shape) is None) == bool(missing_sizes(shape))
