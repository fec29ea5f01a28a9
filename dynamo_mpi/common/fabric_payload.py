# SPDX-License-Identifier: Apache-2.0
"""The payload of the fabric probe, by which the receiver checks the sender and that all bytes are in place."""

from __future__ import annotations

from array import array
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

# a prime number of words, so that no two blocks of a message have the same content
_WORDS = 61
_WORD_BYTES = 4
_HIGHEST = 1 << 15
_corrupt = False


def corrupt_payload() -> None:
    """Let this process send wrong data from now on: an injected fault."""
    global _corrupt
    _corrupt = True


def corruption_injected() -> bool:
    """Return whether this process must send wrong data."""
    return _corrupt


def outgoing(source: int, target: int, size: int) -> bytes:
    """Return the payload that a rank sends.

    Args:
        source: the sending rank.
        target: the receiving rank, or the number of a collective operation.
        size: size in bytes, a multiple of four.
    """
    return _repeat(_pattern(source, target, 1 if _corrupt else 0), size)


def expected(source: int, target: int, size: int) -> bytes:
    """Return the payload that must arrive; arguments as in `outgoing`."""
    return _repeat(_pattern(source, target), size)


def expected_sum(sources: Sequence[int], target: int, size: int) -> bytes:
    """Return the sum of a group's payloads, word by word."""
    parts = [_pattern(source, target) for source in sources]
    return _repeat([sum(words) & 0x7FFFFFFF for words in zip(*parts, strict=True)], size)


def _pattern(source: int, target: int, wrong: int = 0) -> list[int]:
    return [(source * 7919 + target * 10459 + place * 31 + wrong) % _HIGHEST for place in range(_WORDS)]


def _repeat(words: Sequence[int], size: int) -> bytes:
    block = array("i", words).tobytes()
    return (block * (size // len(block) + 1))[: size // _WORD_BYTES * _WORD_BYTES]
