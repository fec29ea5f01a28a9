# SPDX-License-Identifier: Apache-2.0
"""For annotations."""

from __future__ import annotations


class Module:
    """There are none."""
