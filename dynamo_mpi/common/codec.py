# SPDX-License-Identifier: Apache-2.0
"""Encodes lists of strings as bytes, for messages between ranks before the preflight result.

Not JSON, because importing it opens a dozen more files on every rank.
"""

from __future__ import annotations

from dynamo_mpi.common.light_typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence


def encode_strings(values: Sequence[str]) -> bytes:
    """Encode ``values``; any text is allowed, even lone surrogates in file names, and comes out as it went in."""
    # not surrogateescape: what a rank of an ASCII locale reads as two surrogates would become a character that no such rank can open
    parts = [value.encode("utf-8", "surrogatepass") for value in values]
    return b"".join(len(part).to_bytes(4, "little") + part for part in parts)


def decode_strings(data: bytes) -> list[str]:
    """Decode the result of `encode_strings`.

    Raises:
        ValueError: ``data`` is invalid.
    """
    values: list[str] = []
    at = 0
    while at < len(data):
        end = at + 4 + int.from_bytes(data[at : at + 4], "little")
        if end > len(data):
            raise ValueError(f"truncated at byte {at} of {len(data)}")
        values.append(data[at + 4 : end].decode("utf-8", "surrogatepass"))
        at = end
    return values
