# SPDX-License-Identifier: Apache-2.0
"""What a prefill rank sends in the KV probe: of this run and of this rank alone, so that nothing else can pass for it."""

from __future__ import annotations

import random

# prime, so that no part of it looks like another part at a border of pages or packets
_BLOCK_BYTES = 65521
_SPOILT_AT = 1000


def pattern(run: bytes, rank: int, size: int, *, spoilt: bool = False) -> bytes:
    """Return it.

    Args:
        run: number of the run.
        rank: the prefill rank's.
        size: bytes.
        spoilt: with one wrong byte: a fault on demand.
    """
    block = random.Random(b"%s %d" % (run, rank)).randbytes(_BLOCK_BYTES)  # noqa: S311 - no secret
    data = (block * (size // _BLOCK_BYTES + 1))[:size]
    if not spoilt:
        return data
    return data[:_SPOILT_AT] + bytes([data[_SPOILT_AT] ^ 1]) + data[_SPOILT_AT + 1 :]
