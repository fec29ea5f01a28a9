# SPDX-License-Identifier: Apache-2.0
"""What this rank waits for, in plain text, for stack dumps."""

from __future__ import annotations

_doing = ""


def set_activity(text: str) -> None:
    """Say it; nothing when it is over. Costs nothing."""
    global _doing
    _doing = text


def activity() -> str:
    """Return what was said last."""
    return _doing
