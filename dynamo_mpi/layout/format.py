# SPDX-License-Identifier: Apache-2.0
"""Formats numbers, sizes and tables for findings and reports."""

from __future__ import annotations

from dynamo_mpi.common.light_typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

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
