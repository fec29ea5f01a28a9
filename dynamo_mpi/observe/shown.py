# SPDX-License-Identifier: Apache-2.0
"""Errors as anybody may read them, who asks a port or a supervisor. Pure."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dynamo_mpi.supervision.failure import in_short

if TYPE_CHECKING:
    from collections.abc import Callable

redact: Callable[[str], str] = str
"""Takes secrets out of a text."""


def shown(text: str) -> str:
    """Return an error on one line, without what isn't for everybody."""
    return redact(in_short(text))
