# SPDX-License-Identifier: Apache-2.0
"""What this rank waits for, in plain text, for stack dumps."""

from __future__ import annotations

_doing = ""


def set_activity(text: str) -> None:
    """Set the current activity; an empty text clears it. Costs next to nothing."""
    global _doing
    _doing = text


def activity() -> str:
    """Return the current activity."""
    return _doing
