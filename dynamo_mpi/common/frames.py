# SPDX-License-Identifier: Apache-2.0
"""Formats a thread's stack frames. Every rank imports it before the preflight result."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from types import FrameType


def format_frames(frame: FrameType | None) -> list[str]:
    """Return a thread's Python frames, the innermost first."""
    lines: list[str] = []
    while frame is not None:
        # without the source line: its file system may be what all ranks wait for
        lines.append(f"{frame.f_code.co_filename}:{frame.f_lineno} in {frame.f_code.co_name}")
        frame = frame.f_back
    return lines
