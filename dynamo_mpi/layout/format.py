# SPDX-License-Identifier: Apache-2.0
"""Formats numbers, sizes, layouts and tables for findings and reports."""

from __future__ import annotations

from dynamo_mpi.common.light_typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from dynamo_mpi.layout.layout import LayoutSpec

_GIB = 2**30


def listed(items: Iterable[object]) -> str:
    """Format a list as ``1, 2, 4``."""
    return ", ".join(map(str, items))


def counted(number: int, noun: str) -> str:
    """Format a number with its noun: ``1 layer`` or ``2 layers``."""
    return f"{number} {noun}{'' if number == 1 else 's'}"


def gib(size: int) -> str:
    """Format a number of bytes as ``79.3 GiB``."""
    return f"{size / _GIB:.1f} GiB"


def short_name(subject: LayoutSpec) -> str:
    """Format a layout in the usual short form: ``TP8/EP8/PP2``, ``TP8 x CP2 helix/EP16 on a decode worker``."""
    layout = subject.layout
    text = f"TP{layout.tp_size}"
    if layout.cp_size > 1:
        text += f" x CP{layout.cp_size} {(layout.cp_type or '').lower()}".rstrip()
    if layout.moe_ep_size > 1:
        text += f"/EP{layout.moe_ep_size}"
    if layout.pp_size > 1:
        text += f"/PP{layout.pp_size}"
    if layout.enable_attention_dp:
        text += " with attention DP"
    return text + (" on a decode worker" if layout.is_helix else "")


def columns(head: Sequence[str], rows: Sequence[Sequence[str]], *, right: Sequence[int] = ()) -> str:
    """Format a table.

    Args:
        head: the columns' names.
        rows: the cells.
        right: columns that are aligned right, for numbers.
    """
    table = [list(head), *(list(row) for row in rows)]
    widths = [max(len(row[column]) for row in table) for column in range(len(head))]
    lines = []
    for row in table:
        cells = [
            cell.rjust(width) if column in right else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)
