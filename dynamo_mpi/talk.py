# SPDX-License-Identifier: Apache-2.0
"""What a worker says to its user: lines on stderr, each with rank and host once."""

from __future__ import annotations

import contextlib
import os
import sys


class Voice:
    """Speaks for one rank.

    Args:
        rank: this rank.
        host: this node.
    """

    def __init__(self, rank: int, host: str) -> None:
        self.rank, self.host = rank, host
        self._prefix = f"dynamo_mpi: rank {rank} on {host}: "

    def say(self, text: str) -> None:
        """Write ``text``. One call to the system, so that lines of different ranks don't mix."""
        data = (self._prefix + text + "\n").encode("utf-8", "replace")
        try:
            if sys.stderr is not None:  # closed by whoever started us
                sys.stderr.flush()
            os.write(2, data)
        except OSError:
            return  # whoever read our words has gone; that is no reason to fail


def tell_launch(kind: str, rank: int, size: int) -> None:
    """Write the line that users of ``trtllm-llmapi-launch`` look for.

    Args:
        kind: ``"leader"`` or ``"worker"``.
        rank: this rank.
        size: ranks of the world.
    """
    with contextlib.suppress(OSError):
        os.write(2, f"rank{rank} run mgmn {kind} node with mpi_world_size: {size} ...\n".encode())
