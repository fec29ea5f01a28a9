# SPDX-License-Identifier: Apache-2.0
"""Section C: attention data parallelism, as far as it isn't about experts (TensorRT-LLM, ``llm_args.py``, ``embedding.py``)."""

from __future__ import annotations

from dynamo_mpi.common.light_typing import TYPE_CHECKING
from dynamo_mpi.layout.finding import error, info, warning

if TYPE_CHECKING:
    from collections.abc import Iterator

    from dynamo_mpi.layout.finding import Finding
    from dynamo_mpi.layout.layout import LayoutSpec

_BYTES = {"float32": 4, "float": 4}
_NOTABLE = 2 * 2**30


def check_lora_graphs(subject: LayoutSpec) -> Iterator[Finding]:
    """C5: CUDA graphs specialised for LoRA are refused with attention DP (``validate_lora_config_consistency``)."""
    if subject.config.enable_attention_dp and subject.config.lora_cuda_graph:
        yield error(
            "C5",
            "CUDA graphs specialised for LoRA can't be combined with attention DP",
            found="enable_attention_dp true, lora_config.cuda_graph_specialize_lora true",
            expected="one of the two",
            fix="set lora_config.cuda_graph_specialize_lora: false, or enable_attention_dp: false",
        )


def check_balance(subject: LayoutSpec) -> Iterator[Finding]:
    """C7: the time for which a rank waits for others before a step isn't negative, if balancing is on (``AttentionDpConfig``)."""
    config = subject.config
    section = config.keys.get("attention_dp_config")
    if not isinstance(section, dict) or section.get("enable_balance") is not True:
        return
    for key, value in (("timeout_iters", config.adp_timeout_iters), ("batching_wait_iters", config.adp_wait_iters)):
        if value is not None and value < 0:
            yield error(
                "C7",
                f"attention_dp_config.{key} is negative",
                found=f"enable_balance true, {key} {value}",
                expected=f"{key} >= 0",
                fix=f"set attention_dp_config.{key} to 0 or more",
            )


def check_embeddings(subject: LayoutSpec) -> Iterator[Finding]:
    """C2: under attention DP each rank holds the whole embedding and the whole LM head (``embedding.py: LMHead``)."""
    shape, layout = subject.shape, subject.layout
    if not layout.enable_attention_dp or layout.tp_size == 1 or shape.vocab_size is None or shape.hidden_size is None:
        return
    tables = 1 if shape.tied_embeddings else 2
    size = tables * shape.vocab_size * shape.hidden_size * _BYTES.get(shape.dtype or "", 2)
    if size < _NOTABLE:
        return
    what = "embedding, which is its LM head too," if tables == 1 else "embedding and the whole LM head,"
    yield info(
        "C2",
        f"each rank holds the whole {what} {size / 2**30:.1f} GiB: attention DP shares neither out",
        found=f"{shape.name}: vocab_size {shape.vocab_size}, hidden_size {shape.hidden_size}, {layout.tp_size} ranks under attention DP",
    )


def check_dense(subject: LayoutSpec) -> Iterator[Finding]:
    """C1: attention DP is meant for experts and latent attention; dense models gain little, and not every dense MLP supports it
    (``modeling_llama.py`` divides it and leaves its all-reduce out)."""
    shape, layout = subject.shape, subject.layout
    if layout.enable_attention_dp and layout.tp_size > 1 and not shape.suits_attention_dp and shape.layers is not None:
        yield warning(
            "C1",
            "attention DP is set for a dense model: its MLPs may not be written for it, and then its answers are wrong",
            found=f"enable_attention_dp true, {shape.name} without experts",
            expected="a model with experts or latent attention",
            fix="set enable_attention_dp: false, or compare its answers with those of a run without it",
        )


RULES = (
    check_dense,
    check_lora_graphs,
    check_balance,
    check_embeddings,
)
