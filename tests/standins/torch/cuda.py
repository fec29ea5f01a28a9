# SPDX-License-Identifier: Apache-2.0
"""A machine without GPUs, so that a caller who counts them instead of taking ``--gpus-per-node`` is refused."""

from __future__ import annotations


def is_available() -> bool:
    """There is no GPU."""
    return False


def device_count() -> int:
    """There is no GPU."""
    return 0
