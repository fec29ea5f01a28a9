# SPDX-License-Identifier: Apache-2.0
"""Suggests legal tensor-parallel sizes, with the same text for every rule."""

from __future__ import annotations

from dynamo_mpi.common.light_typing import TYPE_CHECKING
from dynamo_mpi.layout.divisibility import legal_tp_sizes, workable_tp_sizes
from dynamo_mpi.layout.format import listed

if TYPE_CHECKING:
    from collections.abc import Callable

    from dynamo_mpi.layout.spec import LayoutSpec


def for_heads(subject: LayoutSpec) -> str:
    """B11: name the sizes that pass all rules about heads."""
    shape, layout = subject.shape, subject.layout
    if layout.enable_attention_dp:
        return "set context_parallel_size to a divisor of the attention heads"
    legal, workable = legal_tp_sizes(shape, layout.cp_size), workable_tp_sizes(shape, layout.cp_size)
    if not legal or not workable:
        return f"no tensor_parallel_size works with context_parallel_size {layout.cp_size}: choose a smaller one"
    why = "B11" if legal == workable else f"B11: heads alone allow {listed(legal)}"
    return f"set tensor_parallel_size to one of {listed(workable)} ({why}){_or_attention_dp(subject)}"


def for_shares(subject: LayoutSpec, fits: Callable[[int], bool]) -> str:
    """Name the sizes that pass a rule about the ranks' shares, and those about heads."""
    legal = [tp for tp in legal_tp_sizes(subject.shape, subject.layout.cp_size) or () if fits(tp)]
    advice = f"set tensor_parallel_size to one of {listed(legal)}" if legal else "use a smaller tensor_parallel_size"
    return advice + _or_attention_dp(subject)


def _or_attention_dp(subject: LayoutSpec) -> str:
    possible = subject.layout.cp_size == 1 and subject.shape.experts is not None
    return ", or enable_attention_dp: true" if possible else ""
