# SPDX-License-Identifier: Apache-2.0
"""Section B: query heads, KV heads and state heads must divide over the ranks. The engine notices only minutes into the load.
And the advice on sizes that all rules about heads share."""

from __future__ import annotations

from dynamo_mpi.common.light_typing import TYPE_CHECKING
from dynamo_mpi.layout.divisibility import kv_copies, kv_heads_fit, legal_tp_sizes, workable_tp_sizes
from dynamo_mpi.layout.finding import error, warning
from dynamo_mpi.layout.format import listed

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from dynamo_mpi.layout.finding import Finding
    from dynamo_mpi.layout.layout import LayoutSpec
    from dynamo_mpi.layout.model_shape import ModelShape


def advice_for_heads(subject: LayoutSpec) -> str:
    """B11: name the sizes that pass all rules about heads."""
    shape, layout = subject.shape, subject.layout
    if layout.enable_attention_dp:
        return "set context_parallel_size to a divisor of the attention heads"
    legal, workable = legal_tp_sizes(shape, layout.cp_size), workable_tp_sizes(shape, layout.cp_size)
    if not legal or not workable:
        return f"no tensor_parallel_size works with context_parallel_size {layout.cp_size}: choose a smaller one"
    why = "B11" if legal == workable else f"B11: heads alone allow {listed(legal)}"
    return f"set tensor_parallel_size to one of {listed(workable)} ({why}){_or_attention_dp(subject)}"


def advice_for_shares(subject: LayoutSpec, fits: Callable[[int], bool]) -> str:
    """Name the sizes that pass a rule about the ranks' shares, and those about heads."""
    legal = [tp for tp in legal_tp_sizes(subject.shape, subject.layout.cp_size) or () if fits(tp)]
    advice = f"set tensor_parallel_size to one of {listed(legal)}" if legal else "use a smaller tensor_parallel_size"
    return advice + _or_attention_dp(subject)


def _or_attention_dp(subject: LayoutSpec) -> str:
    possible = subject.layout.cp_size == 1 and subject.shape.experts is not None
    return ", or enable_attention_dp: true" if possible else ""


# classic attention kernels exist for multiples of 8 from 32 to 256 (TensorRT-LLM issues 679, 855)
_MIN_HEAD_DIM, _MAX_HEAD_DIM = 32, 256


def check_attention_heads(subject: LayoutSpec) -> Iterator[Finding]:
    """B1, B2: query heads divide over tp x cp, or over cp alone with attention DP (``attention.py: Attention.__init__``,
    ``mla.py: MLA.__init__``)."""
    shape, layout = subject.shape, subject.layout
    split = layout.head_split
    over = "cp_size" if layout.enable_attention_dp else "tp_size" if layout.cp_size == 1 else "tp_size x cp_size"
    for count in shape.head_counts:
        if count % split:
            yield error(
                "B2" if shape.latent else "B1",
                f"{count} attention heads can't be divided over {over} = {split}",
                found=f"{shape.name}: num_attention_heads {count}, {over} {split}, remainder {count % split}",
                expected=f"num_attention_heads % ({over}) == 0",
                fix=advice_for_heads(subject),
            )


def check_kv_heads(subject: LayoutSpec) -> Iterator[Finding]:
    """B3: KV heads divide over tp, or are replicated a whole number of times (``modeling_utils.py: duplicate_kv_weight``).
    B4: every replica costs its share of the KV cache again."""
    shape, tp_size = subject.shape, subject.layout.attention_tp_size
    if tp_size == 1:
        return
    for kv_heads in shape.kv_head_counts:
        where = (
            "" if len(shape.kv_head_counts) == 1 else f" in some of its layers, others have {_others(shape, kv_heads)}"
        )
        if not kv_heads_fit(kv_heads, tp_size):
            rule = "num_key_value_heads % tp_size == 0" if kv_heads >= tp_size else "tp_size % num_key_value_heads == 0"
            yield error(
                "B3",
                f"{kv_heads} KV heads can neither be divided over nor replicated to tp_size = {tp_size}",
                found=f"{shape.name}: num_key_value_heads {kv_heads}{where}, tp_size {tp_size}",
                expected=rule,
                fix=advice_for_heads(subject),
            )
        elif (copies := kv_copies(kv_heads, tp_size)) > 1:
            held = "the KV cache" if not where else "the KV cache of these layers"
            yield warning(
                "B4",
                f"each of the {kv_heads} KV heads is held by {copies} ranks: {held} holds every token {copies} times",
                found=f"num_key_value_heads {kv_heads}{where}, tp_size {tp_size}",
                expected=f"tp_size of at most {kv_heads} for a KV cache without copies",
                fix="use attention DP, pipeline stages or a smaller tensor_parallel_size if the cache gets too small",
            )


def _others(shape: ModelShape, kv_heads: int) -> str:
    return listed([count for count in shape.kv_head_counts if count != kv_heads])


def check_cross_attention(subject: LayoutSpec) -> Iterator[Finding]:
    """B6: an encoder's KV heads divide over tp; nothing replicates them (``cross_attention.py``)."""
    shape, tp_size = subject.shape, subject.layout.attention_tp_size
    if shape.encoder_decoder and shape.kv_heads is not None and shape.kv_heads % tp_size:
        yield error(
            "B6",
            f"{shape.kv_heads} encoder KV heads can't be divided over tp_size = {tp_size}",
            found=f"{shape.name}: num_key_value_heads {shape.kv_heads}, tp_size {tp_size}",
            expected="num_key_value_heads % tp_size == 0: cross-attention copies no KV heads",
            fix=advice_for_heads(subject),
        )


def check_output_groups(subject: LayoutSpec) -> Iterator[Finding]:
    """B7: DeepSeek-V4's output groups divide over tp, and its heads over them (DSv4 attention)."""
    shape, tp_size = subject.shape, subject.layout.attention_tp_size
    groups = shape.output_groups
    if groups is None:
        return
    if groups % tp_size:
        yield error(
            "B7",
            f"{groups} output groups can't be divided over tp_size = {tp_size}",
            found=f"{shape.name}: o_groups {groups}, tp_size {tp_size}",
            expected="o_groups % tp_size == 0",
            fix=advice_for_heads(subject),
        )
    if shape.attention_heads is not None and shape.attention_heads % groups:
        yield error(
            "B7",
            f"{shape.attention_heads} attention heads can't be divided into {groups} output groups",
            found=f"{shape.name}: num_attention_heads {shape.attention_heads}, o_groups {groups}",
            expected="num_attention_heads % o_groups == 0",
            fix="check that config.json is the model's own",
        )


def check_head_dim(subject: LayoutSpec) -> Iterator[Finding]:
    """B8: not every head size has a kernel (TensorRT-LLM issues 679, 855)."""
    shape = subject.shape
    size = shape.head_dim
    if (
        size is None
        or shape.latent is not None
        or (size % 8 == 0 and _MIN_HEAD_DIM <= size <= _MAX_HEAD_DIM)
        or shape.output_groups
    ):
        return
    yield warning(
        "B8",
        f"heads of {size} elements may have no attention kernel",
        found=f"{shape.name}: head_dim {size}",
        expected=f"a multiple of 8 from {_MIN_HEAD_DIM} to {_MAX_HEAD_DIM}",
        fix="try it on one GPU first, or set attn_backend",
    )


def check_state_heads(subject: LayoutSpec) -> Iterator[Finding]:
    """B10: state heads, their groups and the convolution divide over tp (``mamba_cache_manager.py``)."""
    state, tp_size = subject.shape.state_space, subject.layout.attention_tp_size
    if state is None or tp_size == 1:
        return
    parts = (
        ("state heads", state.heads, ""),
        ("state groups", state.groups, " (checked by several versions, not by all)"),
        ("convolution channels", state.conv_dim, ""),
    )
    for name, count, remark in parts:
        if count is not None and count % tp_size:
            yield error(
                "B10",
                f"{count} {name} can't be divided over tp_size = {tp_size}{remark}",
                found=f"{subject.shape.name}: {state.heads} state heads in {state.groups} groups, tp_size {tp_size}",
                expected=f"state heads, groups and convolution channels that are multiples of {tp_size}",
                fix=advice_for_heads(subject),
            )
            return


RULES = (
    check_attention_heads,
    check_kv_heads,
    check_cross_attention,
    check_output_groups,
    check_head_dim,
    check_state_heads,
)
