# SPDX-License-Identifier: Apache-2.0
"""Section D, C4 and C6: experts must divide over the ranks. (TensorRT-LLM, ``fused_moe/interface.py``, ``llm_args.py``)"""

from __future__ import annotations

from dynamo_mpi.common.light_typing import TYPE_CHECKING
from dynamo_mpi.layout.divisibility import divisors
from dynamo_mpi.layout.engine_config import DEFAULT_MAX_NUM_TOKENS
from dynamo_mpi.layout.finding import error, info, warning
from dynamo_mpi.layout.format import counted, listed
from dynamo_mpi.layout.model_shape import Feed
from dynamo_mpi.layout.quantisation import (
    FP8_BLOCK,
    FP8_BLOCK_SCALES,
    GROUPED,
    MICROSCALED,
    NVFP4,
    NVFP4_BLOCK,
    W4A16_NVFP4,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

    from dynamo_mpi.layout.finding import Finding
    from dynamo_mpi.layout.layout import LayoutSpec

# a rank's share of an expert must consist of such blocks; for other formats, of the checkpoint's groups
_ERRS_AT = {FP8_BLOCK_SCALES: FP8_BLOCK, NVFP4: NVFP4_BLOCK, W4A16_NVFP4: NVFP4_BLOCK}
_WARNS_AT = dict.fromkeys(MICROSCALED, 128)
# Sixteen ranks at the engine's default. Permuted activations take up to tokens x experts per token x hidden size x 2 bytes:
# 15 GB for DeepSeek-R1 at this size, more than a KV cache can spare beside its weights.
_MANY_TOKENS = 131_072
_DEEP_EP_RANKS = (2, 4, 8)
_DEEP_EP_NODES = (2, 4, 8, 16)


def check_expert_division(subject: LayoutSpec) -> Iterator[Finding]:
    """D1: experts divide over ep, unless a load balancer fills slots instead (``MoE._init_load_balancer``)."""
    experts, layout = subject.shape.experts, subject.layout
    ep_size = layout.moe_ep_size
    if experts is None or ep_size == 1 or subject.config.moe.balanced or experts.count % ep_size == 0:
        return
    uneven = (subject.config.moe.backend or "").upper() == "CUTEDSL" and not subject.older_than(1, 3)
    old = ": this version rounds down in silence, and its weights don't fit" if subject.older_than(1, 3) else ""
    slots = -(-experts.count // ep_size) * ep_size
    yield (warning if uneven else error)(
        "D1",
        f"{experts.count} experts can't be divided over ep_size = {ep_size}{old}",
        found=f"{subject.shape.name}: {experts.count} experts, ep_size {ep_size}, remainder {experts.count % ep_size}",
        expected="experts % ep_size == 0"
        + (": CUTEDSL alone shares them out unevenly" if uneven else ", or a load balancer"),
        fix=f"{_ep_advice(subject)}; or attention DP with moe_config: {{load_balancer: {{num_slots: {slots}}}}}",
    )


def check_balancer_file(subject: LayoutSpec) -> Iterator[Finding]:
    """D4: the load balancer's file exists on the host that builds the engine's arguments (``validate_load_balancer``)."""
    moe = subject.config.moe
    if moe.balanced and not moe.balancer_read:
        say = error if subject.launched else warning
        yield say(
            "D4",
            f"the load balancer's file {moe.balancer_path} can't be read here",
            found=f"moe_config.load_balancer {moe.balancer_path}",
            expected="the file on the leader's node, and where this is checked",
            fix="mount it, or write its settings into moe_config.load_balancer",
        )


def check_slots(subject: LayoutSpec) -> Iterator[Finding]:
    """D2, D3: a load balancer's slots divide over ep and hold every expert (``MoeLoadBalancerConfig.setup``)."""
    experts, moe, ep_size = subject.shape.experts, subject.config.moe, subject.layout.moe_ep_size
    if experts is None or not moe.balanced:
        return
    key, slots = "moe_config.load_balancer.num_slots", moe.num_slots
    legal = -(-experts.count // ep_size) * ep_size
    if not moe.balancer_read:
        return
    if slots is None:
        where = f" in {moe.balancer_path}" if moe.balancer_path is not None else ""
        yield error(
            "D2",
            "the expert load balancer has no num_slots",
            found=f"{key} not set{where}",
            expected="a multiple of ep_size",
            fix=f"set num_slots: {legal}{where or ' in moe_config.load_balancer'}",
        )
        return
    found = f"{key} {slots}, {experts.count} experts, ep_size {ep_size}"
    if slots % ep_size:
        yield error(
            "D2",
            f"{slots} expert slots can't be divided over ep_size = {ep_size}",
            found=f"{found}, remainder {slots % ep_size}",
            expected="num_slots % ep_size == 0",
            fix=f"set {key} to a multiple of {ep_size} of at least {experts.count}: {legal}",
        )
    if slots < experts.count:
        yield error(
            "D3",
            f"{slots} slots can't hold {experts.count} experts",
            found=found,
            expected="num_slots >= experts",
            fix=f"set {key}: {legal}, or more for copies of busy experts",
        )


def check_assignments(subject: LayoutSpec) -> Iterator[Finding]:
    """D3: each layer's initial assignment fills every slot and leaves no expert out (``get_layer_initial_global_assignments``)."""
    experts, moe, layers = subject.shape.experts, subject.config.moe, subject.shape.layers
    if experts is None or not moe.assignments:
        return
    broken: list[str] = []
    for layer, assigned in moe.assignments:
        if moe.num_slots is not None and len(assigned) != moe.num_slots:
            broken.append(f"layer {layer} has {len(assigned)} entries for {moe.num_slots} slots")
        elif unplaced := experts.count - len({expert for expert in assigned if expert < experts.count}):
            broken.append(f"layer {layer} places {experts.count - unplaced} of {experts.count} experts")
        elif max(assigned, default=0) >= experts.count:
            broken.append(f"layer {layer} names expert {max(assigned)} of {experts.count}")
    named = {layer for layer, _ in moe.assignments}
    broken += [
        f"layer {i} has none" for i, layer in enumerate(layers or ()) if layer.feed is Feed.EXPERTS and i not in named
    ]
    if broken:
        yield error(
            "D3",
            f"initial_global_assignments don't fit the model in {counted(len(broken), 'layer')}",
            found="; ".join(broken[:3]) + ("; …" if len(broken) > 3 else ""),
            expected="num_slots entries for each layer with experts, every expert among them",
            fix="correct moe_config.load_balancer.initial_global_assignments, or leave it out",
        )


def check_balancer(subject: LayoutSpec) -> Iterator[Finding]:
    """C6, D13, D14: what a load balancer needs, and what it can't be combined with (``interface.py: _init_load_balancer``)."""
    config, layout = subject.config, subject.layout
    if subject.shape.experts is None or not config.moe.balanced:
        return
    if not layout.enable_attention_dp or layout.moe_ep_size == 1:
        yield error(
            "C6",
            "the expert load balancer works under attention DP and with expert parallelism alone",
            found=f"enable_attention_dp {str(layout.enable_attention_dp).lower()}, ep_size {layout.moe_ep_size}",
            expected="enable_attention_dp true and ep_size > 1",
            fix=f"set enable_attention_dp: true and moe_expert_parallel_size: {layout.moe_world_size}, or leave moe_config.load_balancer out",
        )
    if config.keys.get("dwdp_config") is not None:
        yield error(
            "D13",
            "DWDP and the expert load balancer exclude each other",
            found="dwdp_config and moe_config.load_balancer set",
            expected="one of them",
            fix="leave moe_config.load_balancer or dwdp_config out",
        )
    if (config.load_format or "").upper() == "GMS":
        yield error(
            "D14",
            "weights loaded through GMS can't be balanced",
            found="load_format GMS, moe_config.load_balancer set",
            expected="one of them",
            fix="leave load_format or moe_config.load_balancer out",
        )


def check_expert_width(subject: LayoutSpec) -> Iterator[Finding]:
    """D5: the width of an expert divides over moe_tp; the engine rounds down and checks nothing (``intermediate_size_per_partition``).
    D6: a rank's share is whole scaling blocks; MXFP4 is padded."""
    experts, moe_tp, shape = subject.shape.experts, subject.layout.moe_tp_size, subject.shape
    if experts is None or experts.intermediate_size is None:
        return
    width = experts.intermediate_size
    found = f"{shape.name}: experts of {width}, moe_tp_size {moe_tp}"
    if moe_tp > 1 and width % moe_tp:
        yield error(
            "D5",
            f"experts of {width} can't be divided over moe_tp_size = {moe_tp}",
            found=f"{found}, remainder {width % moe_tp}",
            expected="moe_intermediate_size % moe_tp_size == 0",
            fix=_ep_advice(subject),
        )
        return
    algo, block = _block(subject)
    if algo == NVFP4 and shape.hidden_size is not None and shape.hidden_size % block:
        yield error(
            "D6",
            f"a hidden size of {shape.hidden_size} isn't whole NVFP4 blocks of {block}",
            found=f"{shape.name}: hidden_size {shape.hidden_size}, remainder {shape.hidden_size % block}",
            expected=f"hidden_size % {block} == 0",
            fix="check that config.json is the checkpoint's own, or use another checkpoint",
        )
    if moe_tp <= 1 or (width // moe_tp) % block == 0:
        return
    share = width // moe_tp
    sure = algo in _ERRS_AT and shape.quantisation is not None and shape.quantisation.certain
    padded = ": they are padded, which costs memory and time" if algo in _WARNS_AT else ""
    yield (error if sure else warning)(
        "D6",
        f"each rank would hold {share} of an expert's {width}, which isn't whole blocks of {block} ({algo}){padded}",
        found=f"{found}; {share} / {block} = {share / block:g}",
        expected=f"(moe_intermediate_size / moe_tp_size) % {block} == 0",
        fix=_ep_advice(subject),
    )


def check_all_to_all(subject: LayoutSpec) -> Iterator[Finding]:
    """D11: DeepEP exists for few numbers of ranks; elsewhere, and without NVLink between nodes, every rank gathers all tokens
    (``communication/deep_ep.py``)."""
    layout, node = subject.layout, subject.cluster.gpus_per_node
    ep_size = layout.moe_ep_size
    if subject.shape.experts is None or not layout.enable_attention_dp or ep_size == 1:
        return
    if (
        ep_size in _DEEP_EP_RANKS
        if ep_size <= node
        else node == 8 and ep_size % 8 == 0 and ep_size // 8 in _DEEP_EP_NODES
    ):
        return
    yield info(
        "D11",
        f"DeepEP can't exchange tokens between {ep_size} ranks with {node} on a node: the engine takes another way",
        found=f"ep_size {ep_size}, {subject.cluster}",
        expected="2, 4 or 8 ranks of one node, or 2, 4, 8 or 16 nodes with 8 ranks each",
        fix="nothing to do where NVLink joins all ranks (MNNVL)",
    )


def check_workspace(subject: LayoutSpec) -> Iterator[Finding]:
    """C4: under attention DP max_num_tokens is for each rank, and an expert's workspace is made for the tokens of all ranks at once."""
    config, layout = subject.config, subject.layout
    if subject.shape.experts is None or layout.dp_size == 1 or config.moe.max_num_tokens is not None:
        return
    tokens = config.max_num_tokens or DEFAULT_MAX_NUM_TOKENS
    if tokens * layout.dp_size > _MANY_TOKENS:
        yield warning(
            "C4",
            f"each rank makes room for the {tokens * layout.dp_size} tokens of all ranks beside its experts, and may run out of memory",
            found=f"max_num_tokens {tokens}{'' if config.max_num_tokens else ' (the default)'} x {layout.dp_size} ranks under attention DP",
            expected=f"max_num_tokens x tp_size of at most {_MANY_TOKENS}, or moe_config.max_num_tokens",
            fix=f"set moe_config: {{max_num_tokens: {_MANY_TOKENS // 4}}}, or max_num_tokens: {max(_MANY_TOKENS // layout.dp_size, 1)}",
        )


def _block(subject: LayoutSpec) -> tuple[str, int]:
    """Return the format of the experts whose blocks are largest, and those blocks."""
    forms, quantisation = list(subject.shape.formats("feed", feed=Feed.EXPERTS)), subject.shape.quantisation
    if forms and quantisation is not None and quantisation.algo == FP8_BLOCK_SCALES:
        forms.append(quantisation.format)  # DeepSeek-V4: experts in FP4 take activations in FP8 blocks
    blocks = [
        (_ERRS_AT.get(form.algo) or _WARNS_AT.get(form.algo) or (form.block if form.algo in GROUPED else 1), form.algo)
        for form in forms
    ]
    block, algo = max(blocks, key=lambda found: (found[0], found[1] in _ERRS_AT), default=(1, ""))
    return algo, block


def _ep_advice(subject: LayoutSpec) -> str:
    """Name the sizes of expert parallelism that pass D1, D5 and D6 on these ranks, the largest first."""
    experts, world = subject.shape.experts, subject.layout.moe_world_size
    if experts is None:
        return ""
    block, width = _block(subject)[1], experts.intermediate_size or 0
    legal = [
        ep
        for ep in reversed(divisors(world))
        if experts.count % ep == 0 and (ep == world or width % (world // ep * block) == 0)
    ]
    if not legal:
        return f"choose a tensor_parallel_size that shares a divisor with the {experts.count} experts"
    others = f", or to {listed(legal[1:])}" if legal[1:] else ""
    return f"set moe_expert_parallel_size: {legal[0]}{others}, and leave moe_tensor_parallel_size out"


RULES = (
    check_expert_division,
    check_balancer_file,
    check_slots,
    check_assignments,
    check_balancer,
    check_expert_width,
    check_all_to_all,
    check_workspace,
)
