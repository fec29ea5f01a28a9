# SPDX-License-Identifier: Apache-2.0
"""Shortens errors so that they can be shown without internal details."""

from __future__ import annotations

from dynamo_mpi.common.failure import in_short
from dynamo_mpi.common.redact import own_redactor


def safe_first_line(text: str) -> str:
    """Return an error as one line that is safe to publish."""
    return own_redactor().redact(in_short(text))
