# SPDX-License-Identifier: Apache-2.0
"""What a worker says to its user: lines on stderr, each with rank and host once."""

from __future__ import annotations

import os
import sys


class Voice:
    """Speaks for one rank.

    Args:
        rank: this rank.
        host: this node.
    """

    def __init__(self, rank: int, host: str) -> None:
        self._prefix = f"dynamo_mpi: rank {rank} on {host}: "

    def say(self, text: str) -> None:
        """Write ``text``. One call to the system, so that lines of different ranks don't mix."""
        data = (self._prefix + text + "\n").encode("utf-8", "replace")
        try:
            sys.stderr.flush()
            os.write(2, data)
        except OSError:
            return  # whoever read our words has gone; that is no reason to fail
