# SPDX-License-Identifier: Apache-2.0
"""What this rank waits for, in words, so that whoever asks where it stands is told more than a line of code."""

from __future__ import annotations

_doing = ""


def set_activity(text: str) -> None:
    """Say it; nothing when it is over. Costs nothing."""
    global _doing
    _doing = text


def activity() -> str:
    """Return what was said last."""
    return _doing
