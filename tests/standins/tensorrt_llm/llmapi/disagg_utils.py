# SPDX-License-Identifier: Apache-2.0
"""Ids of requests that two workers share."""

from __future__ import annotations

import itertools

_counter = itertools.count(1)


def get_global_disagg_request_id(node_id: int = 0, process_id: int = 0) -> int:
    """Return an id that no other process gives out."""
    return (1 << 50) + (node_id << 30) + (process_id << 20) + next(_counter)
