# SPDX-License-Identifier: Apache-2.0
"""How findings and reports put numbers into words."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

_GIB = 2**30


def listed(items: Iterable[object]) -> str:
    """Write ``1, 2, 4``."""
    return ", ".join(map(str, items))


def counted(number: int, noun: str) -> str:
    """Write ``1 layer`` or ``2 layers``."""
    return f"{number} {noun}{'' if number == 1 else 's'}"


def gib(size: int) -> str:
    """Write a number of bytes as ``79.3 GiB``."""
    return f"{size / _GIB:.1f} GiB"
