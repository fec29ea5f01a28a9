# SPDX-License-Identifier: Apache-2.0
"""Section E: dense layers must divide over the ranks, in shares of whole scaling blocks. (TensorRT-LLM, ``linear.py``)

Under attention DP dense MLPs and shared experts are held whole by each rank (``overridden_tp_size=1``), so nothing here applies to them.
"""

from __future__ import annotations

from dynamo_mpi.common.frozen import dataclass
from dynamo_mpi.common.light_typing import TYPE_CHECKING
from dynamo_mpi.layout.divisibility import common_split, dense_block, kv_heads_fit, splits_dense_by_gcd
from dynamo_mpi.layout.finding import error, info, warning
from dynamo_mpi.layout.format import counted
from dynamo_mpi.layout.model_shape import Feed, Mixer
from dynamo_mpi.layout.quantisation import (
    FP8_BLOCK,
    FP8_BLOCK_SCALES,
    GROUPED,
    MICROSCALED,
    NVFP4,
    NVFP4_BLOCK,
    W4A16_NVFP4,
)
from dynamo_mpi.layout.rules.attention import advice_for_shares

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from dynamo_mpi.layout.finding import Finding
    from dynamo_mpi.layout.layout import LayoutSpec
    from dynamo_mpi.layout.model_shape import ModelShape
    from dynamo_mpi.layout.quantisation import WeightFormat

    Say = Callable[..., Finding]

_REDUCED = (NVFP4, W4A16_NVFP4, *MICROSCALED, *GROUPED)


@dataclass(frozen=True)
class _Mlp:
    """An MLP that is split over all ranks.

    Args:
        name: for messages.
        key: that its width stands under.
        width: over all ranks.
        formats: number formats of its weights; none if it isn't quantised.
        say: `error`, or `warning` where it isn't certain that it is quantised.
    """

    name: str
    key: str
    width: int
    formats: tuple[WeightFormat, ...]
    say: Say


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
                expected=f"{mlp.key} % ({over}) == 0: down_proj splits its inputs, {parts}",
                fix=_advice(subject, mlp.width, 1),
            )


def check_scale_blocks(subject: LayoutSpec) -> Iterator[Finding]:
    """E4: FP8 blocks are 128 x 128, and no rank can hold part of one; nothing asserts it, so that a misaligned share ends as a size mismatch
    or as wrong scales (``FP8BlockScalesLinearMethod``)."""
    tp_size = subject.layout.dense_tp_size
    for mlp in _split_mlps(subject):
        if _has(mlp.formats, FP8_BLOCK_SCALES) and mlp.width % tp_size == 0 and (mlp.width // tp_size) % FP8_BLOCK:
            share = mlp.width // tp_size
            yield mlp.say(
                "E4",
                f"each rank would hold {share} of {mlp.name} of {mlp.width}, which isn't whole FP8 scaling blocks of {FP8_BLOCK}",
                found=f"{subject.shape.name}: {mlp.key} {mlp.width}, {_over(subject)} {tp_size}; "
                f"{share} / {FP8_BLOCK} = {share / FP8_BLOCK:g}",
                expected=f"({mlp.key} / {_over(subject)}) % {FP8_BLOCK} == 0",
                fix=_advice(subject, mlp.width, FP8_BLOCK),
            )


def check_attention_blocks(subject: LayoutSpec) -> Iterator[Finding]:
    """E4, E11: query and KV heads of a rank are whole FP8 scaling blocks (``FP8BlockScalesLinearMethod``)."""
    shape, layout = subject.shape, subject.layout
    quantisation, say = shape.quantisation, _say(shape)
    inputs = _formats(shape, ("mixer", "output"), mixer=Mixer.ATTENTION)
    if quantisation is None or not _has(inputs, FP8_BLOCK_SCALES) or layout.enable_attention_dp:
        return
    if shape.latent is not None or shape.attention_heads is None or shape.head_dim is None:
        return
    count, split, tp_size = shape.attention_heads, layout.head_split, layout.attention_tp_size
    if split == 1 or count % split or not all(kv_heads_fit(kv_heads, tp_size) for kv_heads in shape.kv_head_counts):
        return  # B1 and B3 report the problem
    shares = [("query", "num_attention_heads", count, count // split)]
    if tp_size > 1:
        by_share = {-(-heads // tp_size): heads for heads in reversed(shape.kv_head_counts)}
        shares += [("KV", "num_key_value_heads", heads, share) for share, heads in by_share.items()]
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
        expected=f"(heads of a rank x head_dim) % {FP8_BLOCK} == 0, for query and for KV heads",
        fix=advice_for_shares(subject, lambda tp: _heads_align(shape, tp, layout.cp_size)),
    )


def check_reduced_blocks(subject: LayoutSpec) -> Iterator[Finding]:
    """E5, E6: a rank's share of the reduced dimension is whole blocks or groups: NVFP4 16, MXFP4 32, AWQ and GPTQ as in the checkpoint
    (``NVFP4LinearMethod``: ``in_features <x> must be divisible by scaling_vector_size 16``)."""
    shape, layout = subject.shape, subject.layout
    shares = [(mlp.formats, mlp.name, mlp.key, mlp.width, layout.dense_tp_size) for mlp in _split_mlps(subject)]
    size = shape.value_size
    if shape.attention_heads is not None and size is not None and shape.attention_heads % layout.head_split == 0:
        outputs = _formats(shape, ("output",), mixer=Mixer.ATTENTION)
        width = shape.attention_heads * size
        shares.append((outputs, "the attention output", "num_attention_heads x head_dim", width, layout.head_split))
    for forms, name, key, width, split in shares:
        for form in forms:
            if form.algo in _REDUCED and split > 1 and width % split == 0 and (width // split) % form.block:
                guessed = form.algo in GROUPED and form.group_size is None
                yield (warning if guessed else _say(shape))(
                    "E5" if form.block == NVFP4_BLOCK else "E6",
                    f"each rank would hold {width // split} of {name} of {width}, which isn't whole {form.algo} blocks of {form.block}",
                    found=f"{shape.name}: {key} {width} over {split} ranks; {width // split} / {form.block} = {width / split / form.block:g}",
                    expected=f"({key} / {split}) % {form.block} == 0",
                    fix=_advice(subject, width, form.block),
                )


def check_common_divisor(subject: LayoutSpec) -> Iterator[Finding]:
    """E9: DeepSeek-V3 and its relatives split the dense MLP by a common divisor of its scaling blocks, tp and the GPUs of a node
    (``modeling_deepseekv3.py: _compute_mlp_tp_size``)."""
    shape, layout = subject.shape, subject.layout
    if not splits_dense_by_gcd(shape):
        return
    for mlp in _mlps(shape):
        name, key, width = mlp.name, mlp.key, mlp.width
        block = max(map(dense_block, mlp.formats), default=1)
        if width % block:
            yield mlp.say(
                "E9",
                f"{name} of {width} can't be divided into scaling blocks of {block}",
                found=f"{shape.name}: {key} {width}, remainder {width % block}",
                expected=f"{key} % {block} == 0",
                fix="check that config.json is the checkpoint's own, or use another checkpoint",
            )
        elif name == "an MLP" and not layout.enable_attention_dp:
            tp_size, node = layout.dense_tp_size, subject.config.gpus_per_node or subject.cluster.gpus_per_node
            split = common_split(width, block, tp_size, node)
            if split < tp_size:
                yield info(
                    "E9",
                    f"the dense MLP is divided over {split} ranks and held {tp_size // split} times: this family doesn't split it further",
                    found=f"{shape.name}: {key} {width}, scaling blocks of {block}, {_over(subject)} {tp_size}, {node} GPUs a node",
                )


def _split_mlps(subject: LayoutSpec) -> Iterator[_Mlp]:
    shape, layout = subject.shape, subject.layout
    if not (layout.enable_attention_dp or splits_dense_by_gcd(shape) or layout.dense_tp_size == 1):
        yield from _mlps(shape)


def _mlps(shape: ModelShape) -> Iterator[_Mlp]:
    if shape.has(Feed.DENSE):
        formats = (*shape.formats("feed", feed=Feed.DENSE), *_formats_beside(shape))
        for width in shape.dense_widths:
            yield _Mlp("an MLP", "intermediate_size", width, _or_the_only(shape, formats), _say(shape))
    if shape.experts is not None and shape.experts.shared_intermediate_size:
        width = shape.experts.shared_intermediate_size
        formats = shape.formats("shared", feed=Feed.EXPERTS)
        yield _Mlp("shared experts", "their intermediate size", width, _or_the_only(shape, formats), _say(shape))


def _formats_beside(shape: ModelShape) -> tuple[WeightFormat, ...]:
    found = (layer.formats.shared for layer in shape.kinds[0] if layer.mlp_beside_experts)
    return tuple(form for form in found if form is not None)


def _formats(shape: ModelShape, parts: tuple[str, ...], mixer: Mixer) -> tuple[WeightFormat, ...]:
    """Return the distinct formats of some parts of the layers with this mixer."""
    layers = [layer for layer in shape.kinds[0] if layer.mixer is mixer]
    found = (getattr(layer.formats, part) for layer in layers for part in parts)
    return _or_the_only(shape, tuple(dict.fromkeys(form for form in found if form is not None)))


def _or_the_only(shape: ModelShape, formats: tuple[WeightFormat, ...]) -> tuple[WeightFormat, ...]:
    """Return the checkpoint's format where its layers aren't known."""
    quantisation = shape.quantisation
    return formats if shape.layers is not None or quantisation is None else (quantisation.format,)


def _say(shape: ModelShape) -> Say:
    """E11: return the function that makes the finding for a part that isn't aligned: a warning if it may not be quantised."""
    sure = shape.quantisation is not None and shape.quantisation.certain and shape.layers is not None
    return error if sure else warning


def _has(formats: tuple[WeightFormat, ...], algo: str) -> bool:
    return any(form.algo == algo for form in formats)


def _over(subject: LayoutSpec) -> str:
    return "tp_size x cp_size" if subject.layout.is_helix else "tp_size"


def _heads_align(shape: ModelShape, tp_size: int, cp_size: int) -> bool:
    """E4 for heads, at a size that divides them."""
    count, size = shape.attention_heads or 0, shape.head_dim or 0
    shares = (count // (tp_size * cp_size), *(-(-kv_heads // tp_size) for kv_heads in shape.kv_head_counts))
    aligned = all(share * size % FP8_BLOCK == 0 for share in shares)
    return aligned or tp_size * cp_size == 1


def _advice(subject: LayoutSpec, width: int, block: int) -> str:
    ranks = subject.layout.cp_size if subject.layout.is_helix else 1
    return advice_for_shares(subject, lambda tp: tp * ranks == 1 or width % (tp * ranks * block) == 0)


RULES = (
    check_division,
    check_scale_blocks,
    check_attention_blocks,
    check_reduced_blocks,
    check_common_divisor,
)
