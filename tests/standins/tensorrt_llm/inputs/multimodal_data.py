# SPDX-License-Identifier: Apache-2.0
"""Multimodal inputs: there are none."""

from __future__ import annotations


class VideoData:
    """For annotations and ``isinstance``."""
