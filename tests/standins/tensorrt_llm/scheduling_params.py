# SPDX-License-Identifier: Apache-2.0
"""Hints for attention DP, which the stand-in doesn't have."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class SchedulingParams:
    """As the real one has it."""

    attention_dp_rank: int | None = None
    attention_dp_relax: bool | None = None
