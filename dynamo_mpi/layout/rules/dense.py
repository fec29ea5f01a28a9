# SPDX-License-Identifier: Apache-2.0
"""Section E: dense layers must divide over the ranks, in shares of whole scaling blocks. (TensorRT-LLM, ``linear.py``)

Under attention DP dense MLPs and shared experts are held whole by each rank (``overridden_tp_size=1``), so nothing here applies to them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from dynamo_mpi.common.frozen import dataclass
from dynamo_mpi.layout import heads
from dynamo_mpi.layout.divisibility import common_split, dense_block
from dynamo_mpi.layout.finding import error, info, warning
from dynamo_mpi.layout.format import counted
from dynamo_mpi.layout.model_shape import Feed, Mixer
from dynamo_mpi.layout.quantisation import FP8_BLOCK, FP8_BLOCK_SCALES, GROUPED, MICROSCALED, NVFP4, NVFP4_BLOCK
from dynamo_mpi.layout.rules import advice

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from dynamo_mpi.layout.finding import Finding
    from dynamo_mpi.layout.model_shape import Layer, ModelShape
    from dynamo_mpi.layout.spec import LayoutSpec

    Say = Callable[..., Finding]


@dataclass(frozen=True)
class _Mlp:
    """An MLP that is split over all ranks.

    Args:
        name: for messages.
        key: that its width stands under.
        width: over all ranks.
        say: `error`, or `warning` where it isn't certain that it is quantised; None if it isn't quantised.
    """

    name: str
    key: str
    width: int
    say: Say | None


def check_division(subject: LayoutSpec) -> Iterator[Finding]:
    """E1, E2, E3: an MLP's width divides over tp: down_proj splits its inputs, gate and up their outputs (``Linear.__init__``)."""
    tp_size, over = subject.layout.dense_tp_size, _over(subject)
    for mlp in _split_mlps(subject):
        if mlp.width % tp_size:
            parts = "gate and up their outputs (E2, E3)" if subject.shape.gated_mlp else "up_proj its outputs (E2)"
            yield error(
                "E1",
                f"{mlp.name} of {mlp.width} can't be divided over {over} = {tp_size}",
                found=f"{subject.shape.name}: {mlp.key} {mlp.width}, {over} {tp_size}, remainder {mlp.width % tp_size}",
                needed=f"{mlp.key} % ({over}) == 0: down_proj splits its inputs, {parts}",
                fix=_advice(subject, mlp.width, 1),
            )


def check_scale_blocks(subject: LayoutSpec) -> Iterator[Finding]:
    """E4: FP8 blocks are 128 x 128, and no rank can hold part of one; nothing asserts it, so that a misaligned share ends as a size mismatch
    or as wrong scales (``FP8BlockScalesLinearMethod``)."""
    quantisation, tp_size = subject.shape.quantisation, subject.layout.dense_tp_size
    if quantisation is None or quantisation.algo != FP8_BLOCK_SCALES or tp_size == 1:
        return
    for mlp in _split_mlps(subject):
        if mlp.say is not None and mlp.width % tp_size == 0 and (mlp.width // tp_size) % FP8_BLOCK:
            share = mlp.width // tp_size
            yield mlp.say(
                "E4",
                f"each rank would hold {share} of {mlp.name} of {mlp.width}, which isn't whole FP8 scaling blocks of {FP8_BLOCK}",
                found=f"{subject.shape.name}: {mlp.key} {mlp.width}, {_over(subject)} {tp_size}; "
                f"{share} / {FP8_BLOCK} = {share / FP8_BLOCK:g}",
                needed=f"({mlp.key} / {_over(subject)}) % {FP8_BLOCK} == 0",
                fix=_advice(subject, mlp.width, FP8_BLOCK),
            )


def check_attention_blocks(subject: LayoutSpec) -> Iterator[Finding]:
    """E4, E11: query and KV heads of a rank are whole FP8 scaling blocks (``FP8BlockScalesLinearMethod``)."""
    shape, layout = subject.shape, subject.layout
    quantisation, say = shape.quantisation, _attention(shape)
    if quantisation is None or quantisation.algo != FP8_BLOCK_SCALES or say is None or layout.enable_attention_dp:
        return
    if shape.latent is not None or shape.attention_heads is None or shape.head_dim is None:
        return
    count, split, tp_size = shape.attention_heads, layout.head_split, layout.attention_tp_size
    if split == 1 or count % split or (shape.kv_heads is not None and not heads.kv_heads_fit(shape.kv_heads, tp_size)):
        return  # B1 and B3 report the problem
    shares = [("query", "num_attention_heads", count, count // split)]
    if shape.kv_heads is not None and tp_size > 1:
        shares.append(("KV", "num_key_value_heads", shape.kv_heads, -(-shape.kv_heads // tp_size)))
    broken = [part for part in shares if part[3] * shape.head_dim % FP8_BLOCK]
    if not broken:
        return
    size = shape.head_dim
    held = " and ".join(counted(share, f"{kind} head") for kind, _, _, share in broken)
    yield say(
        "E4",
        f"each rank would hold {held} of {size}, which isn't whole FP8 scaling blocks of {FP8_BLOCK}"
        + ("" if quantisation.certain else ", if attention is quantised"),
        found=f"{shape.name}: head_dim {size}, {', '.join(f'{key} {number}' for _, key, number, _ in broken)}, {_over(subject)} {split}",
        needed=f"(heads of a rank x head_dim) % {FP8_BLOCK} == 0, for query and for KV heads",
        fix=advice.for_shares(subject, lambda tp: _heads_align(shape, tp, layout.cp_size)),
    )


def check_reduced_blocks(subject: LayoutSpec) -> Iterator[Finding]:
    """E5, E6: a rank's share of the reduced dimension is whole blocks or groups: NVFP4 16, MXFP4 32, AWQ and GPTQ as in the checkpoint
    (``NVFP4LinearMethod``: ``in_features <x> must be divisible by scaling_vector_size 16``)."""
    shape, layout, quantisation = subject.shape, subject.layout, subject.shape.quantisation
    if quantisation is None or quantisation.algo not in (NVFP4, *MICROSCALED, *GROUPED):
        return
    algo = quantisation.algo
    rule, block = ("E5", NVFP4_BLOCK) if algo == NVFP4 else ("E6", quantisation.block)
    guessed = algo in GROUPED and quantisation.group_size is None
    shares = [(mlp.say, mlp.name, mlp.key, mlp.width, layout.dense_tp_size) for mlp in _split_mlps(subject)]
    size = shape.value_size
    if shape.attention_heads is not None and size is not None and shape.attention_heads % layout.head_split == 0:
        width = shape.attention_heads * size
        shares.append(
            (_attention(shape), "the attention output", "num_attention_heads x head_dim", width, layout.head_split)
        )
    for say, name, key, width, split in shares:
        if say is None or split == 1 or width % split or (width // split) % block == 0:
            continue
        yield (warning if guessed else say)(
            rule,
            f"each rank would hold {width // split} of {name} of {width}, which isn't whole {algo} blocks of {block}",
            found=f"{shape.name}: {key} {width} over {split} ranks; {width // split} / {block} = {width / split / block:g}",
            needed=f"({key} / {split}) % {block} == 0",
            fix=_advice(subject, width, block),
        )


def check_common_divisor(subject: LayoutSpec) -> Iterator[Finding]:
    """E9: DeepSeek-V3 and its relatives split the dense MLP by a common divisor of its scaling blocks, tp and the GPUs of a node
    (``modeling_deepseekv3.py: _compute_mlp_tp_size``)."""
    shape, layout, block = subject.shape, subject.layout, dense_block(subject.shape.quantisation)
    if not shape.splits_dense_by_gcd:
        return
    widths: list[tuple[str, str, int, Say | None]] = []
    if shape.intermediate_size is not None and shape.has(Feed.DENSE):
        widths.append(("the dense MLP", "intermediate_size", shape.intermediate_size, _covered(shape, _is_dense)))
    if shape.experts is not None and shape.experts.shared_intermediate_size:
        shared = shape.experts.shared_intermediate_size
        widths.append(("the shared experts", "their intermediate size", shared, _covered(shape, _has_shared)))
    for name, key, width, say in widths:
        if say is not None and width % block:
            yield say(
                "E9",
                f"{name} of {width} can't be divided into scaling blocks of {block}",
                found=f"{shape.name}: {key} {width}, remainder {width % block}",
                needed=f"{key} % {block} == 0",
                fix="check that config.json is the checkpoint's own, or use another checkpoint",
            )
        elif name == "the dense MLP" and width % block == 0 and not layout.enable_attention_dp:
            tp_size, node = layout.dense_tp_size, subject.config.gpus_per_node or subject.cluster.gpus_per_node
            split = common_split(width, block, tp_size, node)
            if split < tp_size:
                yield info(
                    "E9",
                    f"{name} is divided over {split} ranks and held {tp_size // split} times: this family doesn't split it further",
                    found=f"{shape.name}: {key} {width}, scaling blocks of {block}, {_over(subject)} {tp_size}, {node} GPUs a node",
                )


def _split_mlps(subject: LayoutSpec) -> Iterator[_Mlp]:
    shape, layout = subject.shape, subject.layout
    if layout.enable_attention_dp or shape.splits_dense_by_gcd or layout.dense_tp_size == 1:
        return
    if shape.intermediate_size is not None and shape.has(Feed.DENSE):
        yield _Mlp("an MLP", "intermediate_size", shape.intermediate_size, _covered(shape, _is_dense))
    if shape.experts is not None and shape.experts.shared_intermediate_size:
        width = shape.experts.shared_intermediate_size
        yield _Mlp("shared experts", "their intermediate size", width, _covered(shape, _has_shared))


def _is_dense(layer: Layer) -> bool:
    return layer.feed is Feed.DENSE and layer.feed_quantised


def _has_shared(layer: Layer) -> bool:
    return layer.feed is Feed.EXPERTS and layer.shared_quantised


def _attention(shape: ModelShape) -> Say | None:
    return _covered(shape, lambda layer: layer.mixer is Mixer.ATTENTION and layer.mixer_quantised)


def _covered(shape: ModelShape, quantised: Callable[[Layer], bool]) -> Say | None:
    """E11: return the function that makes the finding for a part that isn't aligned: none if the checkpoint excludes it from quantisation."""
    if shape.quantisation is None:
        return None
    if shape.layers is None:
        return warning
    if not any(quantised(layer) for layer in shape.layers):
        return None
    return error if shape.quantisation.certain else warning


def _over(subject: LayoutSpec) -> str:
    return "tp_size x cp_size" if subject.layout.is_helix else "tp_size"


def _heads_align(shape: ModelShape, tp_size: int, cp_size: int) -> bool:
    """E4 for heads, at a size that divides them."""
    count, kv_heads, size = shape.attention_heads or 0, shape.kv_heads or tp_size, shape.head_dim or 0
    aligned = all(share * size % FP8_BLOCK == 0 for share in (count // (tp_size * cp_size), -(-kv_heads // tp_size)))
    return aligned or tp_size * cp_size == 1


def _advice(subject: LayoutSpec, width: int, block: int) -> str:
    ranks = subject.layout.cp_size if subject.layout.is_helix else 1
    return advice.for_shares(subject, lambda tp: tp * ranks == 1 or width % (tp * ranks * block) == 0)


RULES = (
    check_division,
    check_scale_blocks,
    check_attention_blocks,
    check_reduced_blocks,
    check_common_divisor,
)
