# SPDX-License-Identifier: Apache-2.0
"""What goes wrong around hosts in namespaces themselves, apart from what runs on them."""

from __future__ import annotations


class ClusterError(Exception):
    """The hosts cannot be built or are not running; the text says why."""
