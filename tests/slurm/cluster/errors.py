# SPDX-License-Identifier: Apache-2.0
"""What goes wrong around the cluster itself, apart from what jobs do in it."""

from __future__ import annotations


class ClusterError(Exception):
    """The cluster cannot be built or is not running; the text says why."""
